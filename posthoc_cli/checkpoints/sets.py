"""Find the sets of tensors in a checkpoint: the weights of the model, and an average of them.

A set is what lies below a path: keys, and perhaps the first parts of names, joined by dots; or what
a prefix of names such as `ema_*` names. The average is the set that the user names, or the only one
that a word calls so and that has the names and shapes of another set: those are the weights.
Anything else is left to the user, or is not used and said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from posthoc_cli.checkpoints.ask import QuestionError
from posthoc_cli.checkpoints.clock import Time
from posthoc_cli.checkpoints.content import Content, StoredTensor, Tensors, list_names
from posthoc_cli.checkpoints.folders import AVERAGE_WORD, MODEL_FILES, NO_MODEL
from posthoc_cli.checkpoints.source import (
    are_near,
    first_values,
    first_values_of,
    make_checkpoint,
    tied_names,
)
from posthoc_cli.checkpoints.updates import Updates
from posthoc_cli.dtypes import EPS
from posthoc_cli.errors import UnsuitableError, count_noun, quote
from posthoc_cli.profiles import FloatArray, StoredProfile
from posthoc_cli.snapshots.selection import STATISTICS

_Named = dict[str, StoredTensor]

_MODELS = (
    "current_model_state", "state_dict", "model_state_dict", "model_state", "module", *MODEL_FILES,
)  # fmt: skip
"""Keys of the model in a checkpoint; the first present one counts. If Lightning's `state_dict` is
an average, its weights are under `current_model_state`."""
_STATES = re.compile(NO_MODEL.pattern.replace("opt|", "", 1), re.IGNORECASE)
"""Pattern of prefixes of names that are not a model's: `opt` may be a module."""
_WITH_MODEL = re.compile(r"^model_(?:and_optim|optim_rng)")  # names of files, of OLMo and Megatron
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "momentum_buffer"}
"""What torch's optimizers call the averages of gradients in their states."""
_RANDOM = re.compile(r"(?<![a-z])(?:rng|random)_states?$")
"""Pattern of names of the states of generators of random numbers."""
_OF_DATA = re.compile(r"(?:^|[._])(?:mean|var|std|min|max|count|q\d\d|num_batches_tracked)$")
"""In names of statistics, such as those of a normalizer of observations."""
_PARTS = re.compile(r"^(?:named_)?(?:parameter|buffer)s_dict\.")  # of a model, in Composer
_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
"""Parts of names that a wrapper of a module within a model adds, as `torch.compile` does."""


_SMALL = 8  # a part with fewer than one in so many of a model's tensors is one layer of several
_CLEARLY = 4  # squared distances: what is nearest is at most half as far as any other


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds: an average, the weights under the same names, or one of the two."""

    sets: TensorSets
    averaged: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    average_key: str = ""  # path of the average in the checkpoint
    weights_key: str = ""
    # of an ordinary EMA; its profile follows in `Checkpoint.with_settings`
    updates: Updates | None = None
    # of another average, at a step
    profile: Callable[[int], StoredProfile] | None = None
    kind: str = ""  # of another average, one of `KINDS`
    sigma_rel: float = 0.0  # and the width that its user asked for
    reading: Time | None = None  # its number, if its name states it with the profile
    time: int = 0  # on the clock of its run; 0 before the training
    was_swapped: bool = False  # whether it says that the two were exchanged, which are turned
    # settings that must be given, each with its program's default; empty if that has none
    lacks: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # paths of the sets that are neither of these

    @property
    def content(self) -> Content:
        return self.sets.content

    @property
    def path(self) -> Path:
        return self.content.path

    @property
    def count(self) -> int:
        """Updates that its average has counted, one for each step; 0 if none are known."""
        if self.updates is None or self.updates.calls == "counted":
            return 0
        return self.updates.count or 0

    @property
    def tensors(self) -> Tensors:
        """The tensors of the model: the average's, and the weights that the average lacks."""
        if self.averaged:
            return complete(self.averaged, self.weights)
        return self.weights

    @property
    def twins(self) -> list[str]:
        """The unused sets that have as many tensors as the weights or the average, and that no
        tracker has made."""
        counts = {len(self.averaged or self.weights), len(self.weights)}
        others = [key for key in self.unused if key not in self.content.tracker_averages]
        return [key for key in others if self.sets.counts[key] in counts]

    def is_unlike(self, key: str) -> bool:
        """Return whether a set is a network none of whose names the weights have."""
        is_matched = match_names(self.sets.below(key), self.weights)
        return self.sets.holds_network(key) and not is_matched

    def sets_in(self, content: Content) -> Found:
        """Find the same sets in a checkpoint with the same names and shapes."""

        def find(tensors: Tensors) -> Tensors:
            return {name: content.tensors[tensor.name] for name, tensor in tensors.items()}

        found = Found(self.sets.of(content), find(self.averaged), find(self.weights))
        if self.was_swapped:
            found = found.exchanged(found, found)
        return replace(
            found,
            average_key=self.average_key,
            weights_key=self.weights_key,
            unused=self.unused,
        )

    def paired(self, average: str, weights: str) -> Found:
        """Take a set for the average of another one; none if it does not match."""
        theirs = self.sets.below(weights)
        return replace(self, averaged=match_names(self.sets.below(average), theirs), weights=theirs)

    def exchanged(self, average: Found, weights: Found) -> Found:
        """What it holds if an average is in the place of weights, and these in its place; each of
        them is this checkpoint, or another one of its time."""
        shared = average.averaged.keys() & weights.weights.keys()
        averaged = {name: weights.weights[name] for name in shared}
        raw = {name: average.averaged[name] for name in shared}
        if average is weights:
            return replace(
                self, averaged={**self.averaged, **averaged}, weights={**self.weights, **raw}
            )
        if self is average:
            return replace(self, sets=weights.sets, averaged=averaged)
        return replace(self, sets=average.sets, weights=raw)

    @property
    def starts(self) -> tuple[FloatArray, FloatArray]:
        """The first elements of the average, and of its weights: of matrices if there are any, as
        the vectors of two networks, such as the gains of norms, may be near each other."""
        shared = self.averaged.keys() & self.weights.keys()
        names = {name for name in shared if len(self.weights[name].shape) > 1} or shared
        ours = make_checkpoint(self.content, {name: self.averaged[name] for name in names})
        theirs = make_checkpoint(self.content, {name: self.weights[name] for name in names})
        with ours:  # the file stays open
            return first_values(ours), first_values(theirs)


class TensorSets:
    """The sets of tensors of a checkpoint, without optimizer states and the like.

    A path is the keys that lead to a set, and perhaps the first parts of names, joined by dots; or
    a prefix of names with a `*` behind it.
    """

    def __init__(
        self,
        content: Content,
        named: Iterable[str | None] = (),
        parts: Collection[str] = (),
    ) -> None:
        """`named`: what the user calls sets; these count as sets, whatever their words say.
        `parts`: the paths of parts of the model that a word calls averages."""
        self.content = content
        self._parts = parts
        self.tensors = _Named()
        self.counts = Counter[str]()  # of tensors, by path
        self.keys = dict[str, str]()  # the last key of each path of whole keys
        self._at = dict[str, list[StoredTensor]]()  # not below further keys, by path of whole keys
        given = [text for text in named if text]
        for name, tensor in content.tensors.items():
            if _is_state(tensor, content) and not any(_lies_below(tensor, text) for text in given):
                continue
            self.tensors[name] = tensor
            self.counts.update(_paths(tensor))
            *outer, _ = tensor.keys
            self._at.setdefault(".".join(outer), []).append(tensor)
            for level, key in enumerate(outer, 1):
                self.keys[".".join(outer[:level])] = key

    @cached_property
    def averages(self) -> list[str]:
        """The outermost paths that a word calls an average. A prefix of few names belongs to a
        layer."""
        found = list[str]()
        for path in sorted(self.counts, key=_depth):
            key = self.keys.get(path) or path.rpartition(".")[2]
            is_inner = any(_lies_in(path, average) for average in found)
            if is_inner or path in self._parts or not AVERAGE_WORD.search(key):
                continue
            group = path
            while group and group not in self.keys:
                group = group.rpartition(".")[0]
            if 4 * self.counts[path] >= len(self._at.get(group, ())):
                found.append(path)
        return found

    def of(self, content: Content) -> TensorSets:
        """Return the sets of a checkpoint with the same names and shapes."""
        sets = copy(self)
        sets.content = content
        sets.tensors = _Named({name: content.tensors[name] for name in self.tensors})
        return sets

    def is_averaged(self, path: str) -> bool:
        """Return whether a path is an average, or leads into one."""
        return any(_lies_in(path, average) for average in self.averages)

    def below(self, path: str) -> Tensors:
        """Return the tensors of a set by the rest of their names, without averages beside them."""
        if path.endswith("*"):
            return self._with_prefix(path[:-1])
        start = f"{path}." if path else ""
        is_average = self.is_averaged(path)
        inner = {}
        for name, tensor in self.tensors.items():
            if name.startswith(start) and (is_average or not self.is_averaged(name)):
                inner[_PARTS.sub("", name.removeprefix(start))] = tensor
        return inner

    def _with_prefix(self, prefix: str) -> Tensors:
        begin = re.compile(rf"(?:^|\.){re.escape(prefix)}")
        found = {}
        for name, tensor in self.tensors.items():
            if match := begin.search(name):
                found[name[match.end() :]] = tensor
        return found

    def find_path(self, text: str, setting: str) -> str:
        """Find the path of the outermost set that a text or glob means; raise an error if there is
        none, or if there are several. `setting` has the text."""
        text = text.rstrip(".")
        matching = [path for path in self.counts if path and _means(text, path)]
        level = min(map(_depth, matching), default=0)
        outermost = [path for path in matching if _depth(path) == level]
        if len(outermost) == 1:
            return outermost[0]
        if outermost:
            reason = f"has several sets of tensors {quote(text)}: {list_names(outermost)}"
            raise QuestionError(self.content.path, reason, *({setting: path} for path in outermost))
        if text.endswith("*") and self._with_prefix(text[:-1]):
            return text
        choices = list_names([*self.keys])
        if not choices:
            choices = f"only the tensors {list_names([*self.content.tensors])}"
        reason = f"has no set of tensors {quote(text)}; there are {choices}"
        raise UnsuitableError(self.content.path, reason)

    def without(self, used: Iterable[StoredTensor]) -> tuple[str, ...]:
        """List the outermost paths of sets that hold none of these tensors."""
        used = {*used}
        outer = {""}
        for tensor in used:
            outer.update(_paths(tensor))
        unused = dict[str, None]()
        for tensor in self.tensors.values():
            paths = [path for path in _paths(tensor) if path not in outer]
            averages = [path for path in paths if path in self.averages]
            if averages:
                unused[averages[0]] = None
            elif tensor in used or _is_counter(tensor):
                continue
            elif paths:
                unused[paths[0]] = None
            elif AVERAGE_WORD.search(tensor.keys[-1]):
                unused[f"{tensor.name} (one tensor)"] = None
        return tuple(unused)

    # --- the model

    @cached_property
    def models(self) -> list[str]:
        """The path of the model's weights; several paths, or none, if it is unclear."""
        return self._find_models("")

    def _find_models(self, path: str) -> list[str]:
        groups = self._groups_below(path)
        known = [group for group in groups if self.keys[group] in _MODELS]
        if len(groups) > 1:
            groups = [each for each in groups if each in known or self._is_network(each)] or groups
        is_model = self.keys.get(path) in _MODELS
        if known and (len(groups) == 1 or not is_model):
            return self._find_models(min(known, key=lambda group: _MODELS.index(self.keys[group])))
        if is_model or self._is_flat(path, groups):
            return [path]
        return self._find_models(groups[0]) if len(groups) == 1 else groups

    def _inner_paths(self, path: str) -> list[str]:
        """List the paths that go on from a path by one key."""
        return [inner for inner, key in self.keys.items() if inner == f"{path}.{key}".lstrip(".")]

    def _groups_below(self, path: str) -> list[str]:
        """List the paths that go on from a path by one key, but to no average."""
        return [inner for inner in self._inner_paths(path) if not self.is_averaged(inner)]

    def _is_flat(self, path: str, groups: Sequence[str]) -> bool:
        """Return whether the tensors at a path itself are a model, and not a loss or the like
        beside one."""
        flat = self._at.get(path, [])
        sizes = [self.counts[group] for group in groups]
        has_names = any("." in tensor.keys[-1] for tensor in flat)
        return has_names or len(flat) >= max(sizes, default=1)

    @cached_property
    def parts(self) -> list[str]:
        """The paths of the parts of the model: its main part, and the networks next to it that are
        no twins of it; or several networks that are no copies of each other. Raise an error if it
        is unclear."""
        path = self.content.path
        if not self.content.tensors:
            raise UnsuitableError(path, "holds no tensors with names")
        if not self.models:
            groups = list_names(self.content.groups)
            raise UnsuitableError(path, f"holds no weights, only tensors under {groups}")
        main, *others = self.models
        if not others:
            return [main, *self._parts_beside(main)]
        if all(map(self.holds_network, self.models)) and not self._has_copies(self.models):
            return self.models
        reason = "which tensors are the model's is unclear: it has tensors under"
        answers = [{"weights": model} for model in self.models]
        raise QuestionError(path, f"{reason} {list_names(self.models)}", *answers)

    def _parts_beside(self, main: str) -> list[str]:
        if not main:
            return []
        found = []
        for path in self._groups_below(main.rpartition(".")[0]):
            is_part = path != main and self.holds_network(path)
            if is_part and not self._match(path, main).averaged:
                found.append(path)
        return found

    def _has_copies(self, paths: Iterable[str]) -> bool:
        """Return whether two sets have the same names and shapes, and values near each other: two
        critics are no copies."""
        for path, other in combinations(paths, 2):
            match = self._match(path, other)
            if match.averaged and are_near(*match.starts):
                return True
        return False

    def twins_in(self, path: str) -> list[tuple[str, str]]:
        """List the pairs of large parts of a set that have as many tensors."""
        firsts = Counter(name.partition(".")[0] for name in self.below(path))
        least = firsts.total() / _SMALL
        large = [f"{path}.{first}".lstrip(".") for first in firsts if firsts[first] >= least]
        return [pair for pair in combinations(large, 2) if len({*map(self.counts.get, pair)}) == 1]

    def _match(self, path: str, other: str) -> Found:
        """Match a set with the names of another one."""
        theirs = self.below(other)
        return Found(self, match_names(self.below(path), theirs), theirs, path, other)

    def model_path(self) -> str:
        """Find the path of the model's weights, or of the keys of its parts; raise an error if it
        is unclear."""
        main, *_ = self.parts
        return main if len(self.models) == 1 else main.rpartition(".")[0]

    def model(self) -> Tensors:
        """Return the weights of the model by name, of all its parts: under their own names if the
        parts are files whose names for tensors differ, else under their keys."""
        by_key = {}
        for path in self.parts:
            key = "" if [path] == self.models else path.rpartition(".")[2]
            by_key[key] = self._part(path)
        names = [name for part in by_key.values() for name in part]
        # the parts of a folder are files of their own
        is_bare = self.content.path.is_dir() and len(set(names)) == len(names)
        tensors = _Named()
        for key, part in by_key.items():
            for name, tensor in part.items():
                tensors[name if is_bare or not key else f"{key}.{name}"] = tensor
        return tensors

    def _part(self, path: str) -> Tensors:
        tensors = self.below(path)
        if not path:
            return {name: tensor for name, tensor in tensors.items() if len(tensor.keys) == 1}
        return tensors

    def holds_network(self, path: str) -> bool:
        """Return whether a set has a matrix that is called a weight: hyperparameters, metrics and
        replay buffers may have matrices, too."""
        for name, tensor in self.below(path).items():
            if len(tensor.shape) > 1 and name.rpartition(".")[2] == "weight":
                return True
        return False

    def _is_network(self, path: str) -> bool:
        """Return whether a set has matrices, or vectors of a layer, and is no statistics: the state
        of a loss has neither."""
        if self.holds_statistics(path):
            return False
        tensors = self.below(path).values()
        are_matrices = (sum(size > 1 for size in tensor.shape) > 1 for tensor in tensors)
        return any(are_matrices) or any(each.keys[-1] in ("weight", "bias") for each in tensors)

    def holds_statistics(self, path: str) -> bool:
        """Return whether all names in a set are those of statistics of data."""
        return all(map(_OF_DATA.search, self.below(path)))

    def with_parts(self) -> TensorSets:
        """Return the sets in which networks that a word calls averages, and that are near no other
        set, are parts of the model."""
        parts = []
        for path in self.averages:
            if self.holds_network(path) and not self._may_be_average(path):
                parts.append(path)
        return TensorSets(self.content, parts=parts) if parts else self

    def _may_be_average(self, path: str) -> bool:
        try:
            return any(are_near(*pair.starts) for pair in self.pairs(path))
        except QuestionError:  # of which weights it is one
            return True

    # --- an average and the weights

    def pairs(
        self,
        average: str,
        weights: str | None = None,
        is_named: bool = False,
    ) -> list[Found]:
        """Find an average with the weights that match it, or several averages at the keys next to
        a path, as of several decays; none if no weights match.

        Arguments:
            average: the path of the average, or of what it lies in.
            weights: the path of what the weights lie in; None to look everywhere.
            is_named: whether the user has named the average, which then may be a small part.
        """
        pairs = []
        for path in self._within(average):
            pairs += self._pairs_at(path, weights, is_named)
        if not pairs:
            for path in self._inner_paths(average):
                pairs += self._pairs_at(path, weights, is_named)[:1]
            return pairs
        best = min(map(self._rank, pairs))
        likeliest = [pair for pair in pairs if self._rank(pair) == best]
        keys = [*dict.fromkeys(pair.weights_key for pair in likeliest)]
        if len(keys) > 1:
            reason = f"which of its sets of tensors is the model is unclear: {list_names(keys)}"
            raise QuestionError(self.content.path, reason, *({"weights": key} for key in keys))
        return likeliest[-1:]  # without keys of the average's own, such as `module`

    def alone(self, average: str) -> Found:
        """Return an average without weights, by its names without the keys that all of them begin
        with."""
        path = average
        for inner in self._within(average):
            if inner in self.keys and self.counts[inner] == self.counts[average]:
                path = inner
        return Found(self, self.below(path), {}, path)

    def is_all(self, path: str) -> bool:
        """Return whether a set has all tensors but counters."""
        named = self.tensors.items()
        return all(_lies_in(name, path) or _is_counter(tensor) for name, tensor in named)

    def _within(self, path: str) -> Iterator[str]:
        """Yield a path, and the paths of the main parts within it."""
        inner: str | None = path
        while inner is not None:
            yield inner
            inner = None if inner.endswith("*") else self._main_part(inner)

    def _main_part(self, path: str) -> str | None:
        """Find the path of the part of a set that a word calls an average; else of the part below a
        key with most of its tensors, or below a prefix of all its names."""
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
    ) -> list[Found]:
        averaged = self.below(average)
        if weights is not None:
            averaged = _without_nested(averaged, self.below(weights))
        if not averaged:
            return []
        if listed := _by_position(averaged):
            path = self.model_path() if weights is None else weights
            raw = self._with_names(path)
            return [Found(self, self._match_list(listed, raw), raw, average, path)]
        pairs = []
        roots = self._roots(averaged, average) if weights is None else [weights]
        for path in roots:
            raw = _without_nested(self._with_names(path), averaged)
            if path.endswith("*"):  # of buffers, whose names have no dots
                raw = match_names(raw, averaged)
            matched = match_names(averaged, raw)
            if matched and (is_named or 2 * len(matched) > len(raw)):
                pairs.append(Found(self, matched, raw, average, path))
        return pairs

    def _with_names(self, path: str) -> Tensors:
        """Return the tensors of a set; a list takes the names of the model, and the weights that it
        lacks."""
        tensors = self.below(path)
        listed = _by_position(tensors)
        if not listed or path in self.models:
            return tensors
        model = self._part(self.model_path())
        return {**model, **self._match_list(listed, model)}

    def _rank(self, pair: Found) -> tuple[bool, bool, bool, int]:
        """Rate how unlikely a set is to be the weights of an average. Unlikely are a set within an
        average, a set outside of the model, a key other than the average's without the word for it,
        and a deep path."""
        outer, dot, last = pair.average_key.rpartition(".")
        rest = AVERAGE_WORD.sub("", last).strip("_-.")
        path = pair.weights_key
        model = self.models[0] if len(self.models) == 1 else ""
        is_outside = bool(model) and not _lies_in(path, model)
        is_other = path != outer + dot + rest
        return self.is_averaged(path), is_outside, is_other, _depth(path)

    def _roots(self, averaged: Tensors, average: str) -> list[str]:
        """Find the paths outside of an average below which a tensor has its longest name."""
        names = [name for name, tensor in averaged.items() if not _is_counter(tensor)]
        if not names:
            return []
        longest = max(names, key=len)
        outside = [name for name in self.tensors if not _lies_in(name, average)]
        roots = _find_roots(longest, outside, _squeeze)
        return roots or _find_roots(longest, outside, _strip_wrappers)

    def _match_list(self, listed: Tensors, weights: Tensors) -> Tensors:
        """Match a list of averages with the names of their weights: in their order, or by shapes
        and values. Raise a QuestionError if neither tells.

        Safetensors files are sorted by name.
        """
        ties = tied_names(weights)
        known = _Named()
        for name, tensor in weights.items():
            if name not in ties and _may_be_listed(name, tensor):
                known[name] = tensor
        in_order = [listed[position] for position in sorted(listed, key=lambda each: each.zfill(9))]
        is_counted = listed.keys() == {*map(str, range(len(listed)))}  # and no places in memory
        shapes = [tensor.shape for tensor in in_order]
        is_sorted = any(_is_safetensors(tensor) for tensor in known.values())
        if is_counted and not is_sorted and shapes == [each.shape for each in known.values()]:
            return dict(zip(known, in_order, strict=True))
        matched = _Named()
        for shape in {*shapes}:
            ours = [tensor for tensor in in_order if tensor.shape == shape]
            theirs = {name: tensor for name, tensor in known.items() if tensor.shape == shape}
            matched.update(zip(self._find_nearest(ours, theirs), ours, strict=False))
        if len(matched) == len(in_order):
            return matched
        reason = f"holds an average without names: a list of {count_noun(len(shapes), 'tensor')}, "
        reason += f"whose order among {count_noun(len(known), 'weight')} nothing shows"
        raise QuestionError(self.content.path, reason, {"kind": "checkpoints"})

    def _find_nearest(self, ours: Sequence[StoredTensor], theirs: Tensors) -> list[str]:
        """Find the name of each of some tensors among others of their shape: the only one, or that
        of the values that they are clearly nearest to, as an average is to its weights. Empty if
        one is unclear."""
        if len(ours) == len(theirs) == 1:
            return [*theirs]
        if len(ours) > len(theirs):
            return []
        others = self._read_rows([*theirs.values()])
        names = []
        for row in self._read_rows(ours):
            distances = np.square(others - row).sum(axis=1)
            own, second = np.sort(distances)[:2]
            if own < second / _CLEARLY:
                names.append([*theirs][distances.argmin()])
        return names if len(names) == len(ours) else []

    def _read_rows(self, tensors: Sequence[StoredTensor]) -> FloatArray:
        """Read the first elements of tensors of one shape, [tensors, elements]."""
        numbered = {f"{number:09}": tensor for number, tensor in enumerate(tensors)}
        return first_values_of(self.content, numbered).reshape(len(tensors), -1)


def _without_nested(tensors: Tensors, others: Tensors) -> Tensors:
    """Return the tensors of a set without the tensors of another set that lies in it."""
    theirs = {*others.values()}
    left = {name: tensor for name, tensor in tensors.items() if tensor not in theirs}
    return left or tensors


def match_names(averaged: Tensors, weights: Tensors) -> Tensors:
    """Match an average with the names of weights, without counters and a few buffers of its own;
    empty if a shape differs, or more names do."""
    by_bare = None
    matched = {}
    others = 0
    for name, tensor in averaged.items():
        full = name
        if name not in weights:
            if by_bare is None:
                by_bare = {_strip_wrappers(each): each for each in weights}
                if len(by_bare) < len(weights):
                    return {}  # two names are alike
            full = by_bare.get(_strip_wrappers(name), "")
        if full and weights[full].shape == tensor.shape:
            matched[full] = tensor
        elif _is_counter(tensor):
            continue
        elif full:
            return {}
        else:
            others += 1
    return matched if 4 * others <= len(matched) else {}


def complete(averaged: Tensors, weights: Tensors) -> Tensors:
    """Put an average in the weights' order, and add the weights' tensors that it lacks.

    Names of one tensor are one place: the average under one of them is the average under all.
    """
    if not weights:
        return averaged
    first_names = tied_names(weights)
    by_first = _Named()
    for name in weights:
        if name in averaged:
            by_first.setdefault(first_names.get(name, name), averaged[name])
    return {name: by_first.get(first_names.get(name, name), weights[name]) for name in weights}


def _is_state(tensor: StoredTensor, content: Content) -> bool:
    """Return whether a tensor is of an optimizer or the like, or of a copy of the best model."""
    *outer, name = tensor.keys
    if content.is_of_optimizer(tensor.name):
        return True
    if any(NO_MODEL.search(key) and not _WITH_MODEL.search(key) for key in outer):
        return True
    if tensor.keys[0].startswith("best_"):
        return True
    if not _MOMENTS.isdisjoint([*outer, *name.split(".")]):
        return True
    first, dot, _ = name.partition(".")
    pattern = _STATES if dot else _RANDOM
    return pattern.search(first) is not None


def _is_counter(tensor: StoredTensor) -> bool:
    return tensor.shape in ((), (1,))


def _by_position(tensors: Tensors) -> Tensors:
    """Return tensors that have positions in place of names, perhaps behind a word for averages that
    all begin with; empty if they have names."""
    listed = {}
    starts = set()
    for name, tensor in tensors.items():
        start = name.rstrip("0123456789")
        listed[name.removeprefix(start)] = tensor
        starts.add(start)
    start = "".join(starts)
    has_positions = len(starts) == 1 and "" not in listed
    return listed if has_positions and (not start or AVERAGE_WORD.search(start)) else {}


def _may_be_listed(name: str, tensor: StoredTensor) -> bool:
    """Return whether a list of averages may hold the average of a tensor, that is, whether it is
    trained."""
    is_statistic = name.rpartition(".")[2] in STATISTICS
    return not is_statistic and tensor.chunks[0].entry.dtype in EPS


def _is_safetensors(tensor: StoredTensor) -> bool:
    return any(chunk.path.suffix == ".safetensors" for chunk in tensor.chunks)


def _paths(tensor: StoredTensor) -> list[str]:
    """List the paths of all sets that a tensor is in, the outermost first."""
    *outer, name = tensor.keys
    parts = [*outer, *name.split(".")]
    return [".".join(parts[:level]) for level in range(1, len(parts))]


def _depth(path: str) -> int:
    return path.count(".")


def _lies_in(path: str, outer: str) -> bool:
    """Return whether a path is another one, or leads on from it."""
    return f"{path}.".startswith(f"{outer}.")


def _means(text: str, path: str) -> bool:
    return fnmatchcase(path, text) or fnmatchcase(path, f"*.{text}")


def _lies_below(tensor: StoredTensor, text: str) -> bool:
    """Return whether a tensor is in a set that a text or glob means."""
    return any(_means(text.rstrip("."), path) for path in _paths(tensor))


def _find_roots(longest: str, names: Iterable[str], form: Callable[[str], str]) -> list[str]:
    """Find the paths below which one of the names is the longest name of an average, both in a
    common form."""
    wanted = form(longest)
    roots = dict[str, None]()
    for name in names:
        if form(name).endswith(wanted):
            parts = name.split(".")
            for level in range(len(parts)):
                if form(".".join(parts[level:])) == wanted:
                    roots[".".join(parts[:level])] = None
    return [*roots]


def _strip_wrappers(name: str) -> str:
    """Strip wrappers, dots and underscores from a name: libraries that keep averages in buffers
    remove the dots, or replace them."""
    return _squeeze(_WRAPPERS.sub("", name))


def _squeeze(name: str) -> str:
    """Remove dots and underscores from a name."""
    return name.replace(".", "").replace("_", "")
