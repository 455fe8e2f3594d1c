"""Find the sets of tensors in a checkpoint: the weights of the model, and an average of them.

A set is what lies below a key, or below a prefix of names. The average is a set whose key has a
word for it, or the one that a user names; the weights are a set with the same names and shapes,
anywhere outside of it. Both may have further keys or prefixes in front of their names. An average
may have names without dots, or be a list in the order of the parameters, perhaps of the trained
ones only: such a list is matched with the weights by its values.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from posthoc_cli.checkpoints.content import (
    AVERAGE_WORD,
    NO_MODEL,
    Content,
    StoredTensor,
    Tensors,
    names_in,
)
from posthoc_cli.checkpoints.source import STATISTICS, make_checkpoint, tied_names
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import FileFormatError, UnsuitableError, shown
from posthoc_cli.profiles import FloatArray

_Named = dict[str, StoredTensor]
_MODEL_GROUPS = ("current_model_state", "state_dict", "model_state_dict", "model", "module")
"""Keys of the model in a checkpoint; the first present one counts. If Lightning's `state_dict` is
an average, its weights are under `current_model_state`."""
_STATES = re.compile(NO_MODEL.pattern.replace("opt|", "", 1), re.IGNORECASE)
"""Pattern of prefixes of names that are not a model's: `opt` may be a module."""
_RANDOM = re.compile(r"(?<![a-z])(?:rng|random)_states?$")
"""Pattern of names of the states of generators of random numbers."""
_PARTS = re.compile(r"^(?:named_)?(?:parameter|buffer)s_dict\.")  # of a model, in Composer
_WHICH = "name the average by `average`, or the model by `weights`, or both, in an import"
_LETTER = re.compile("[A-Za-z]")
_SAMPLED = 4096  # elements of a tensor that are compared with others of its shape
_LIKELY = 0.5  # an assignment is clear if each change of it adds more than this share of distance


@dataclass(frozen=True)
class Pair:
    """An average and the weights of the same model, by the names of the weights."""

    averaged: Tensors
    weights: Tensors  # empty if the average is alone
    average_key: str  # path of the average in the checkpoint
    weights_key: str = ""


def lies_below(tensor: StoredTensor, text: str) -> bool:
    """Return whether a tensor is in a set that a text or glob means, or is meant itself."""
    paths = [*_paths(tensor), tensor.name]
    return any(_means(text.rstrip("."), path) for path in paths if path)


def lies_in(path: str, outer: str) -> bool:
    """Return whether a path is another one, or leads on from it."""
    return f"{path}.".startswith(f"{outer}.")


class Sets:
    """The sets of tensors of a checkpoint, without those of optimizers and the like.

    A path is the keys that lead to a set, and perhaps the first parts of names, joined by dots.
    """

    def __init__(
        self,
        content: Content,
        named: Sequence[str | None] = (),
    ) -> None:
        """`named`: paths that hold a set, whatever their words say."""
        self.content = content
        self.tensors = _Named()
        self.counts = Counter[str]()
        self.keys = dict[str, str]()  # the last key of each path of whole keys
        self._groups = set[str]()  # first keys of tensors that are not an optimizer's
        self.kept = set[str]()  # what one keeps of each parameter, perhaps averages of gradients
        named_paths = [path for path in named if path]
        keys = _KEPT_BY_OPTIMIZERS.union(path.rpartition(".")[2] for path in named_paths)
        for tensor in content.tensors.values():
            is_state = _is_state(tensor) or content.is_of_optimizer(tensor)
            if is_state and tensor.keys[-1] in keys:
                tensor = self._by_last_key(tensor)
            is_named = any(lies_in(tensor.name, path) for path in named_paths)
            if is_named or not is_state or not keys.isdisjoint(tensor.keys[:-1]):
                self.tensors[tensor.name] = tensor
                self._count(tensor)
                if not is_state:
                    self._groups.add(tensor.keys[0])
        self.averages = list[str]()
        self._find_averages()

    def _by_last_key(self, tensor: StoredTensor) -> StoredTensor:
        """Return a tensor of a parameter, such as `state.0.ema`, as one of a set `state.ema`."""
        *outer, parameter, last = tensor.keys
        self.kept.add(".".join((*outer, last)))
        return replace(tensor, keys=(*outer, last, parameter))

    def _count(self, tensor: StoredTensor) -> None:
        *outer, _ = tensor.keys
        self.counts.update(_paths(tensor))
        for level, key in enumerate(outer, 1):
            path = ".".join(outer[:level])
            self.keys[path] = key

    def _find_averages(self) -> None:
        """Find the outermost paths that a word calls an average.

        A prefix of few names is that of a layer, unless it is a part beside a large one.
        """
        in_group = Counter[str]()
        for tensor in self.tensors.values():
            group = ".".join(tensor.keys[:-1])
            in_group[group] += 1
        places = set()
        by_size = [path for path, _ in self.counts.most_common()]
        for path in sorted(by_size, key=_depth):
            outer, _, last = path.rpartition(".")
            key = self.keys.get(path, last)
            word = AVERAGE_WORD.search(key)
            if word is None or path in self.kept or self.is_averaged(path):
                continue
            group = path
            while group and group not in self.keys:
                group = group.rpartition(".")[0]
            is_large = 4 * self.counts[path] >= in_group[group]
            place = (outer, word[0])
            is_part = place in places
            if path in self.keys or is_large or is_part:
                self.averages.append(path)
                places.add(place)

    def is_all(self, path: str) -> bool:
        """Return whether a set has all tensors but counters."""
        for name, tensor in self.tensors.items():
            if lies_in(name, path):
                continue
            if not _is_counter(tensor):
                return False
        return True

    def is_averaged(self, path: str) -> bool:
        """Return whether a path is that of an average, or leads into one."""
        return any(lies_in(path, average) for average in self.averages)

    def below(self, path: str) -> Tensors:
        """Return the tensors of a set by the rest of their names, without averages beside them."""
        start = f"{path}." if path else ""
        is_average = bool(path) and self.is_averaged(path)
        inner = {}
        for name, tensor in self.tensors.items():
            if not name.startswith(start):
                continue
            if is_average or not self.is_averaged(name):
                rest = name.removeprefix(start)
                inner[_PARTS.sub("", rest)] = tensor
        return inner

    def are_alike(self, path: str, other: str) -> bool:
        """Return whether two sets that lie apart have the same names and shapes. (A copy of the
        best model so far is not a set of its own, nor what an optimizer keeps.)"""
        if lies_in(path, other) or lies_in(other, path):
            return False
        if self.keys[path].startswith("best_") or path in self.kept:
            return False
        return self._shapes(path) == self._shapes(other)

    def _shapes(
        self,
        path: str,
    ) -> dict[str, tuple[int, ...]]:
        return {unwrapped(name): tensor.shape for name, tensor in self.below(path).items()}

    def without(
        self,
        used: Iterable[StoredTensor],
    ) -> tuple[str, ...]:
        """Return the outermost paths of sets that hold none of these tensors, and are not parts of
        an average."""
        used = {*used}
        outer = {""}
        for tensor in used:
            outer.update(_paths(tensor))
        unused = dict[str, None]()
        for tensor in self.tensors.values():
            paths = [path for path in _paths(tensor) if path not in outer]
            averages = [path for path in paths if path in self.kept or path in self.averages]
            if averages:
                unused[averages[0]] = None
            elif tensor in used or _is_counter(tensor):
                continue
            elif paths and not self.is_averaged(paths[0]):
                unused[paths[0]] = None
            elif not paths and AVERAGE_WORD.search(tensor.keys[-1]):
                unused[f"{tensor.name} (one tensor)"] = None
        return tuple(unused)

    def named(self, text: str) -> str:
        """Return the path of the outermost set that a text or glob means; raise FileFormatError if
        there is none, or are several."""
        text = text.rstrip(".")
        matching = [path for path in self.counts if path and _means(text, path)]
        level = min(map(_depth, matching), default=0)
        outermost = [path for path in matching if _depth(path) == level]
        if len(outermost) == 1:
            return outermost[0]
        if outermost:
            reason = f"has several sets of tensors {shown(text)}: {names_in(outermost)}"
            raise FileFormatError(self.content.path, reason)
        choices = names_in([*self.keys])
        if not choices:
            choices = f"only the tensors {names_in([*self.content.tensors])}"
        reason = f"has no set of tensors {shown(text)}; there are {choices}"
        raise UnsuitableError(self.content.path, reason)

    # --- the model

    @cached_property
    def models(self) -> list[str]:
        """The path of the model's weights; those of several sets, or none, if it is unclear.

        Copies of the best model so far do not count.
        """
        known = self.content.groups()
        groups = [name for name in known if name in self._groups and not self.is_averaged(name)]
        groups = [name for name in groups if not name.startswith("best_")] or groups
        for name in _MODEL_GROUPS:
            if name in groups:
                return [name]
        if len(groups) == 1:
            within = self.content.groups(groups[0])
            for name in _MODEL_GROUPS:
                if name in within:
                    return [f"{groups[0]}.{name}"]
        flat = [name for name, tensor in self.tensors.items() if len(tensor.keys) == 1]
        largest = max((self.counts[name] for name in groups), default=1)
        # not a loss or the state of a generator beside the model
        is_flat = len(flat) >= largest or any("." in name for name in flat)
        return [""] if is_flat else groups

    def model_path(self) -> str:
        """Return the path of the model's weights; raise FileFormatError if it is unclear."""
        if len(self.models) == 1:
            return self.models[0]
        path = self.content.path
        if not self.models:
            under = names_in(self.content.groups())
            raise UnsuitableError(path, f"holds no weights, only tensors under {under}")
        reason = "which tensors are the model's is unclear: it has tensors under"
        raise UnsuitableError(path, f"{reason} {names_in(self.models)}", _WHICH)

    def model(self, prefix: str = "") -> Tensors:
        """Return the weights of the model by name; all tensors if none of the model's names has a
        prefix."""
        if not self.content.tensors:
            raise UnsuitableError(self.content.path, "holds no tensors with names")
        if prefix and len(self.models) != 1:
            return self.tensors
        path = self.model_path()
        tensors = self.below(path)
        if not path:
            tensors = {name: tensor for name, tensor in tensors.items() if len(tensor.keys) == 1}
        has_prefix = any(name.startswith(prefix) for name in tensors)
        return tensors if has_prefix or not prefix else self.tensors

    # --- an average and the weights

    def pair(
        self,
        average: str,
        weights: str | None = None,
        is_named: bool = False,
    ) -> Pair | None:
        """Return an average and the weights that match it; None if no weights do.

        Arguments:
            average: the path of the average, or of what it lies in.
            weights: the path of what the weights lie in; None to look everywhere.
            is_named: whether the user has named the average, which then may be a small part.
        """
        pairs = []
        for path in self._within(average):
            pairs += self._pairs_at(path, weights, is_named)
        if not pairs:
            self._check_unpaired(average, weights if is_named else None)
            return None
        best = min(map(self._rank, pairs))
        likeliest = [pair for pair in pairs if self._rank(pair) == best]
        keys = [pair.weights_key for pair in likeliest]
        if len(set(keys)) > 1:
            reason = f"which of its sets of tensors is the model is unclear: {names_in(keys)}"
            raise UnsuitableError(self.content.path, reason, _WHICH)
        return likeliest[0]

    def _check_unpaired(self, average: str, named: str | None) -> None:
        """Raise FileFormatError if an average has most names of some weights, and others, if it
        does not match the weights at a path that is named, or if it holds several averages."""
        for path in self._within(average):
            averaged = self.below(path)
            roots = self._roots(averaged, path) if named is None else [named]
            for root in roots:
                weights = self.below(root)
                others = [name for name in averaged if name not in weights]
                are_few = 2 * len(others) < len(averaged)
                is_large = 2 * len(averaged) > len(weights)
                if named is not None or (others and are_few and is_large):
                    reason = "holds an EMA and weights of different models: only the EMA has"
                    reason = f"{reason} {names_in(others)}"
                    hint = _common_part(path, root, [*weights])
                    raise FileFormatError(self.content.path, reason, hint)
        averages = []
        for path, key in self.keys.items():
            is_within = path == f"{average}.{key}"
            if is_within and self._pairs_at(path, None, False):
                averages.append(path)
        self.check_one(averages)

    def check_one(self, averages: Sequence[str]) -> None:
        """Raise FileFormatError if there are several averages."""
        if len(averages) > 1:
            reason = "which of its sets of tensors is the average is unclear"
            raise UnsuitableError(self.content.path, f"{reason}: {names_in(averages)}", _WHICH)

    def alone(self, average: str) -> Pair:
        """Return an average without weights, without keys that all its names begin with."""
        path = average
        for inner in self._within(average):
            is_all = self.counts[inner] >= self.counts[path]
            if inner not in self.keys or not is_all:
                break
            path = inner
        return Pair(self.below(path), {}, path)

    def joined(self, pairs: list[Pair]) -> list[Pair]:
        """Return the average of which these are parts, such as `momentum_backbone` and
        `momentum_projector`; themselves if they are averages of their own."""
        roots = {pair.weights_key for pair in pairs}
        places = {_place(pair) for pair in pairs}
        are_keys = any(pair.average_key in self.keys for pair in pairs)
        outer, other, _ = places.pop()
        if are_keys or places or len(roots) < len(pairs) or outer != other:
            return pairs
        averaged = {}
        weights = {}
        for pair in pairs:
            part = pair.weights_key.rpartition(".")[2]
            for name, tensor in pair.averaged.items():
                averaged[f"{part}.{name}"] = tensor
            for name, tensor in pair.weights.items():
                weights[f"{part}.{name}"] = tensor
        return [Pair(averaged, weights, pairs[0].average_key, outer)]

    def _within(self, path: str) -> Iterator[str]:
        """Yield a path, and those of the main parts within it."""
        inner: str | None = path
        while inner is not None:
            yield inner
            inner = self._main_part(inner)

    def _main_part(self, path: str) -> str | None:
        """Return the path of the part of a set that a word calls an average; else of the one below
        a key with most of its tensors, or below a prefix of all its names."""
        parts = Counter[str]()
        total = 0
        for name, tensor in self.below(path).items():
            first, dot, _ = name.partition(".")
            if dot:
                parts[first] += 1
            if not _is_counter(tensor):
                total += 1
        for part in parts:
            if AVERAGE_WORD.search(part):
                return f"{path}.{part}".lstrip(".")
        for part, count in parts.most_common(1):
            inner = f"{path}.{part}".lstrip(".")
            is_most = inner in self.keys and 2 * count > total
            if is_most or count >= total:
                return inner
        return None

    def _pairs_at(
        self,
        average: str,
        weights: str | None,
        is_named: bool,
    ) -> list[Pair]:
        averaged = self.below(average)
        is_listed = averaged and all(map(str.isdecimal, averaged))
        pairs = []
        roots = []
        if not (is_listed and average in self.keys):
            roots = self._roots(averaged, average)
        for path in roots:
            if weights is None or lies_in(path, weights):
                raw = self.below(path)
                by_name = match_names(averaged, raw)
                if by_name and (is_named or 2 * len(by_name) > len(raw)):
                    pairs.append(Pair(by_name, raw, average, path))
        if is_listed and not pairs:  # no model of numbered parameters
            path = self.model_path() if weights is None else weights
            raw = self.below(path)
            pairs = [Pair(match_list(self.content, averaged, raw), raw, average, path)]
        return pairs

    def _rank(
        self,
        pair: Pair,
    ) -> tuple[bool, bool, bool, int]:
        """Return how unlikely a set is to be the weights of an average: it is within an average,
        or outside of the model, has not its key without the word, or lies deep."""
        outer, dot, last = pair.average_key.rpartition(".")
        rest = AVERAGE_WORD.sub("", last).strip("_-.")
        path = pair.weights_key
        model = self.models[0] if len(self.models) == 1 else ""
        is_outside = not lies_in(path, model)
        is_other = path != outer + dot + rest
        return self.is_averaged(path), is_outside, is_other, _depth(path)

    def _roots(self, averaged: Tensors, average: str) -> list[str]:
        """Return the paths below which a tensor has the longest name of an average."""
        names = [name for name, tensor in averaged.items() if not _is_counter(tensor)]
        if not names:
            return []
        longest = max(names, key=lambda name: (_depth(name), len(name), name))
        outside = [name for name in self.tensors if not name.startswith(f"{average}.")]
        roots = _roots_of(longest, outside, _squeeze)
        return roots or _roots_of(longest, outside, _bare)


_KEPT_BY_OPTIMIZERS = {
    "ema", "ema_params", "ema_state", "shadow_params", "param_ema", "swa_buffer", "ax", "z",
}  # fmt: skip
"""Keys of an average among the states of an optimizer that keeps it, as NeMo's and ASGD do; `z` of
schedule-free ones are the weights, whose average is in their place."""


def _is_state(tensor: StoredTensor) -> bool:
    """Return whether a tensor is of an optimizer or the like."""
    *outer, name = tensor.keys
    if any(map(NO_MODEL.search, outer)):
        return True
    first, dot, _ = name.partition(".")
    pattern = _STATES if dot else _RANDOM
    return pattern.search(first) is not None


def _paths(tensor: StoredTensor) -> list[str]:
    """Return the paths of all sets that a tensor is in, the outermost first."""
    *outer, name = tensor.keys
    parts = [*outer, *name.split(".")]
    return [".".join(parts[:level]) for level in range(len(parts))]


def _depth(path: str) -> int:
    return path.count(".")


def _means(text: str, path: str) -> bool:
    return fnmatchcase(path, text) or fnmatchcase(path, f"*.{text}")


def _squeeze(name: str) -> str:
    """Return a name without dots and underscores: libraries that keep averages in buffers remove
    the dots, or replace them."""
    return name.replace(".", "").replace("_", "")


_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
"""Parts of names that a wrapper of a module within a model adds, as `torch.compile` does."""


def unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers of modules add."""
    return _WRAPPERS.sub("", name)


def _bare(name: str) -> str:
    """Return a name without wrappers, dots and underscores."""
    return _squeeze(unwrapped(name))


def _roots_of(
    longest: str,
    names: Iterable[str],
    form: Callable[[str], str],
) -> list[str]:
    """Return the paths below which one of the names is the longest of an average, in a form of
    both."""
    longest_form = form(longest)
    last = _squeeze(longest.rpartition(".")[2])
    roots = dict[str, None]()
    for name in names:
        if not _squeeze(name).endswith(last):
            continue
        parts = name.split(".")
        for level in range(len(parts)):
            rest = ".".join(parts[level:])
            if form(rest) == longest_form:
                root = ".".join(parts[:level])
                roots[root] = None
    return list(roots)


def _place(pair: Pair) -> tuple[str, str, str]:
    """Return where the sets of a pair lie, and the word in the key of the average."""
    outer, _, last = pair.average_key.rpartition(".")
    word = AVERAGE_WORD.search(last)
    return outer, pair.weights_key.rpartition(".")[0], word[0] if word else ""


def _common_part(
    average: str,
    weights: str,
    names: Sequence[str],
) -> str:
    """Return how to name the part that an average and weights with these names share."""
    alone = "`kind` checkpoints takes the weights alone"
    heads = {name.rpartition(".")[0].partition(".")[0] for name in names}
    common = heads.pop()
    if heads or not common:
        return alone
    part = f"`average` '{average}.{common}' with `weights` '{weights}.{common}'"
    return f"import the common part by {part}; {alone}"


def twin_parts(tensors: Tensors) -> dict[str, str]:
    """Return the parts of a model of which another part has the same names and shapes, each with
    that one's name; none unless both together are half of the model.

    All names of twins differ in the same word, as `encoder` and `encoder_m`; layers differ in a
    number.
    """
    start = _common_start([*tensors])
    shapes = dict[str, dict[str, tuple[int, ...]]]()
    sizes = Counter[str]()
    for name, tensor in tensors.items():
        first, _, rest = name.removeprefix(start).partition(".")
        part = start + first
        shapes.setdefault(part, {})[rest] = tensor.shape
        sizes[part] += math.prod(tensor.shape)
    for twins in _twins_by_word(shapes):
        size = sum(sizes[part] + sizes[twin] for part, twin in twins.items())
        if 2 * size > sizes.total():
            return twins
    return {}


def _twins_by_word(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> list[dict[str, str]]:
    """Return the parts with the same tensors, for each word in which their names differ."""
    alike = dict[frozenset[Any], list[str]]()
    for part, of_part in shapes.items():
        tensors = frozenset(of_part.items())
        alike.setdefault(tensors, []).append(part)
    twins = dict[tuple[str, str], dict[str, str]]()
    for parts in alike.values():
        for part, twin in combinations(sorted(parts, key=len), 2):
            words = _different_words(part, twin)
            if any(map(_LETTER.search, words)):
                twins.setdefault(words, {})[part] = twin
    return [*twins.values()]


def _common_start(names: Sequence[str]) -> str:
    """Return the first parts of names that all have, with a dot after them."""
    parts = [name.split(".")[:-1] for name in names]
    start = ""
    for heads in zip(*parts, strict=False):
        head = heads[0]
        if any(other != head for other in heads):
            break
        start += f"{head}."
    return start


def _different_words(first: str, other: str) -> tuple[str, str]:
    """Return what is left of two names without their common beginning and end."""
    while first and first[:1] == other[:1]:
        first = first[1:]
        other = other[1:]
    while first and first[-1:] == other[-1:]:
        first = first[:-1]
        other = other[:-1]
    return first, other


def _is_counter(tensor: StoredTensor) -> bool:
    return tensor.shape in ((), (1,))


def match_names(averaged: Tensors, weights: Tensors) -> Tensors | None:
    """Return an average by the names of weights, without counters of its own; None if it has a
    tensor that they lack, or of another shape."""
    by_squeezed = None
    matched = {}
    for name, tensor in averaged.items():
        full = name
        if name not in weights:
            if by_squeezed is None:
                by_squeezed = {_bare(one): one for one in weights}
                if len(by_squeezed) < len(weights):
                    return None  # two names are alike
            full = by_squeezed.get(_bare(name), "")
        if full and weights[full].shape == tensor.shape:
            matched[full] = tensor
        elif not _is_counter(tensor):
            return None
    return matched


# --- lists


def match_list(content: Content, listed: Tensors, weights: Tensors) -> Tensors:
    """Return a list of averages by the names of the weights that they are of.

    Of each shape, the assignment has the least distance to the weights, relative to their norms.
    Raise FileFormatError if none is possible, or if another one is about as near.
    """
    known = {name: tensor for name, tensor in weights.items() if _may_be_listed(name, tensor)}
    positions = sorted(listed, key=int)
    in_order = {position: listed[position] for position in positions}
    shapes = [tensor.shape for tensor in in_order.values()]
    is_complete = shapes == [tensor.shape for tensor in known.values()]
    is_counted = int(positions[-1]) < len(positions)  # and no number in memory
    if is_complete and is_counted and _keeps_order(weights):
        return dict(zip(known, in_order.values(), strict=True))
    matched = {}
    with make_checkpoint(content, known):  # the files stay open
        for shape in dict.fromkeys(shapes):
            tensors = _of_shape(in_order, shape)
            candidates = _of_shape(known, shape)
            if len(tensors) > len(candidates):
                reason = f"holds an EMA without names, of which {len(tensors)} have the shape"
                reason += f" {list(shape)}, and {len(candidates)} such weights"
                raise FileFormatError(content.path, reason)
            matched.update(_match_shape(content, tensors, candidates))
    return matched


def _may_be_listed(name: str, tensor: StoredTensor) -> bool:
    """Return whether a list of averages may hold that of a tensor: one that is trained."""
    is_statistic = name.rpartition(".")[2] in STATISTICS
    return not is_statistic and tensor.chunks[0].entry.dtype in EPS


def _of_shape(tensors: Tensors, shape: tuple[int, ...]) -> _Named:
    return {name: tensor for name, tensor in tensors.items() if tensor.shape == shape}


def _keeps_order(weights: Tensors) -> bool:
    """Return whether tensors are in the order of the model: safetensors files are sorted."""
    for tensor in weights.values():
        if any(chunk.path.suffix == ".safetensors" for chunk in tensor.chunks):
            return False
    return True


def _match_shape(content: Content, listed: Tensors, weights: Tensors) -> _Named:
    """Return tensors of a shape by the names of the weights that they are nearest to."""
    names = list(weights)
    tensors = list(listed.values())
    if len(tensors) == len(names) == 1:
        return {names[0]: tensors[0]}
    theirs = _samples(content, weights)
    distances = _distances(_samples(content, listed), theirs)
    columns = _nearest(distances)
    for row, column in enumerate(columns):
        for other in range(len(names)):
            is_same = np.array_equal(theirs[other], theirs[column])
            if not is_same and not _is_clear(distances, columns, row, other):
                reason = "holds an EMA without names, of which one fits two weights about equally"
                pair = names_in([names[column], names[other]])
                raise FileFormatError(content.path, f"{reason}: {pair}")
    return {names[column]: tensor for column, tensor in zip(columns, tensors, strict=True)}


def _distances(ours: FloatArray, theirs: FloatArray) -> FloatArray:
    """Return the squared distance of each row to each other one, relative to the larger norm:
    [ours, theirs]."""
    apart = _squares(ours[:, None] - theirs)
    own = _squares(ours)[:, None]
    norms = np.maximum(_squares(theirs) + 1e-30, own)
    return apart / norms


def _nearest(distances: FloatArray) -> list[int]:
    """Return a column of its own for each row, so that the sum of distances is least.

    Among equal tensors the order decides: those that have not moved yet.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = np.indices(distances.shape)
    order = np.abs(rows - columns) * 1e-12
    _, nearest = linear_sum_assignment(distances + order)
    return list(map(int, nearest))


def _squares(values: FloatArray) -> FloatArray:
    """Return the sums of squares over the last axis."""
    squares: FloatArray = np.square(values).sum(axis=-1)
    return squares


def _is_clear(
    distances: FloatArray,
    columns: Sequence[int],
    row: int,
    other: int,
) -> bool:
    """Return whether another column of a row is clearly farther; the row that has that column takes
    the first one's in exchange."""
    column = columns[row]
    before = distances[row, column]
    after = distances[row, other]
    if other in columns:
        partner = columns.index(other)
        before += distances[partner, other]
        after += distances[partner, column]
    return bool(after > (1 + _LIKELY) * before)


def _samples(content: Content, tensors: Tensors) -> FloatArray:
    """Return the first elements of tensors of one shape: [tensors, elements]."""
    rows = []
    with make_checkpoint(content, tensors) as source:
        for name, tensor in tensors.items():
            stored = source.aliases.get(name, name)
            count = min(math.prod(tensor.shape), _SAMPLED)
            rows.append(source.values(stored, 0, count))
    return np.stack(rows)


def completed(averaged: Tensors, weights: Tensors) -> Tensors:
    """Return an average in the weights' order, with the weights' tensors that it lacks.

    Names of one tensor are one place: the average of one of them is that of all.
    """
    if not weights:
        return averaged
    first_names = tied_names(weights)
    places = {name: first_names.get(name, name) for name in weights}
    by_place = _Named()
    for name, place in places.items():
        if name in averaged:
            by_place.setdefault(place, averaged[name])
    return {name: by_place.get(place, weights[name]) for name, place in places.items()}
