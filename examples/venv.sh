# Sourced by the scripts: makes .venv when needed, keeps it in step with the requirements, puts it on the PATH.
# Arguments: the requirements files. PYTHON names the interpreter to make it with; SD_HYENA_VENV another place for it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${SD_HYENA_VENV:-.venv}
if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, set PYTHON")'
  "${PYTHON:-python3}" -m venv "$venv"
fi
for requirements in "$@"; do
  if ! cmp -s "$requirements" "$venv/installed-$requirements"; then
    echo "installing $requirements into $venv ..." >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cp "$requirements" "$venv/installed-$requirements"
  fi
done
PATH=$(cd "$venv/bin" && pwd):$PATH
