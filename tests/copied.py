"""Copies of a pipeline: unpickled, with its tensors copied apart."""

from __future__ import annotations

import copy
import io
import pickle

import torch


class _Pickler(pickle.Pickler):
    """Leaves tensors out: the same one is the same number."""

    def __init__(self, file):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors, self.numbers = [], {}

    def persistent_id(self, value):
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tensors):
        super().__init__(file)
        self.tensors, self.copies = tensors, {}

    def persistent_load(self, number):
        if number not in self.copies:
            self.copies[number] = copy.deepcopy(self.tensors[number])
        return self.copies[number]


class Copied:
    """What can be copied in a tenth of the time that deepcopy takes."""

    def __init__(self, pipe):
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(pipe)
        self.content, self.tensors = file.getvalue(), pickler.tensors

    def copy(self):
        return _Unpickler(io.BytesIO(self.content), self.tensors).load()
