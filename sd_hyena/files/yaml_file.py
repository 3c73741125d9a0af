"""YAML files of options, read strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.text import read_text

LARGEST = 1 << 20  # bytes


def read_documents(path: str) -> list[dict[str, Any]]:
    """The mappings of options in a YAML file; refuses what PyYAML would let pass: duplicate keys, enormous files.

    Raises BadInput.
    """
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = {str(key) for key in keys if keys.count(key) > 1}
            if twice:
                raise yaml.YAMLError(f"the key {', '.join(sorted(twice))} stands twice")
            return super().construct_mapping(node, deep)

    # PyYAML follows YAML 1.1, where 1e-4 is text; everybody means the number.
    Strict.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    Strict.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        if Path(path).stat().st_size > LARGEST:
            raise BadInput(f"config={path!r} is larger than {LARGEST} bytes; that is no config")
        documents = list(yaml.load_all(read_text(path), Strict)) or [None]
    except OSError as error:
        raise BadInput(f"config={path!r} cannot be read: {error.strerror}") from None
    except BadInput as error:
        raise error if str(error).startswith("config=") else BadInput(f"config: {error}") from None
    except Exception as error:  # of a value that is not what its tag says PyYAML raises anything: "!!bool x", "!!int"
        raise BadInput(f"config={path!r} is not valid YAML: {first_line(error)}") from None
    for content in documents:
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise BadInput(f"config={path!r} must be a mapping of option: value")
        if "from_image" in content:
            raise BadInput(f"config={path!r}: from_image works as a flag only (--from)")
    return documents


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
