"""Semantic IDs against sets and dictionaries of tuples: unique, found again, and exactly those that the trie allows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.properties import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from grbench.workloads import events as loaders
from grbench.workloads import movielens
from grengines.runtime import cache_dir
from grengines.semantic import id_cache
from grengines.semantic.ids import SPARE, SemanticIds, build, propose_codes
from grengines.semantic.quantise import residual_kmeans
from grengines.semantic.trie import TensorTrie, Trie
from grengines.semantic.vectors import UNTOUCHED, clustered, from_interactions

FEW = examples(25)  # k-means takes a fixed number of steps: about 0.1 s a build


@st.composite
def catalogues(draw: st.DrawFn) -> SemanticIds:
    """Any set of tuples, in any order of items: tries and tokens don't depend on where they come from."""
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    tuples = list(itertools.product(*map(range, sizes)))
    chosen = draw(st.lists(st.sampled_from(tuples), min_size=1, max_size=60, unique=True))
    return SemanticIds(np.array(chosen, np.int32), sizes)


@FEW
@given(
    items=st.integers(1, 64),
    dim=st.integers(1, 5),
    distinct=st.integers(1, 64),
    magnitude=st.sampled_from([0.0, 1e-30, 1.0, 1e30]),
    offset=st.sampled_from([0.0, 1e3]),
    levels=st.integers(1, 4),
    spare=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_built_ids_are_unique_and_found_again(
    items: int, dim: int, distinct: int, magnitude: float, offset: float, levels: int, spare: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((distinct, dim), np.float32)[rng.integers(distinct, size=items)]
    codes = next(k for k in itertools.count(1) if k**levels >= items) + spare
    ids = build(np.float32(offset) + vectors * np.float32(magnitude), levels, codes, seed)
    assert ids.codes.shape == (items, levels)
    assert ids.codes.min() >= 0 and ids.codes.max() < codes
    assert len({tuple(row) for row in ids.codes.tolist()}) == items
    everyone = np.arange(items)
    assert (ids.items(ids.tokens(everyone)) == everyone).all()


@examples(100)
@given(catalogues())
def test_tokens_and_items_against_a_dictionary(ids: SemanticIds) -> None:
    expected: dict[tuple[int, ...], int] = {}
    for item, row in enumerate(ids.codes.tolist()):
        expected[tuple(sum(ids.sizes[:level]) + code for level, code in enumerate(row))] = item
    everyone = np.arange(len(ids.codes))
    tokens = ids.tokens(everyone)
    assert tokens.dtype == np.int64 and [tuple(row) for row in tokens.tolist()] == list(expected)
    assert ids.vocabulary == sum(ids.sizes)
    for level, (offset, size) in enumerate(zip(ids.offsets, ids.sizes, strict=True)):
        assert ((tokens[:, level] >= offset) & (tokens[:, level] < offset + size)).all()
    anything = np.array(
        list(itertools.islice(itertools.product(range(-1, ids.vocabulary + 1), repeat=ids.levels), 3000))
    )
    assert ids.items(anything).tolist() == [expected.get(tuple(row), -1) for row in anything.tolist()]
    assert ids.items(tokens).tolist() == everyone.tolist()


def step(trie: TensorTrie, level: int, nodes: npt.NDArray[Any], codes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """int64 [n]: nodes of the next level, -1 where the code may not follow."""
    first, there_are, there = (x.numpy() for x in trie.children(level, torch.from_numpy(nodes)))
    found = there & (there_are == codes[:, None])
    return np.where(found.any(1), first + found.argmax(1), -1)


@examples(100)
@given(catalogues())
def test_the_trie_is_the_set_of_tuples(ids: SemanticIds) -> None:
    arrays = Trie.of(ids)
    assert arrays.nbytes == sum(x.nbytes for x in (*arrays.child_offsets, *arrays.child_codes, arrays.leaf_items))
    trie, rows = arrays.on("cpu"), ids.codes.tolist()
    prefixes: list[tuple[int, ...]] = [()]
    nodes = np.zeros(1, np.int64)
    for level, size in enumerate(ids.sizes):  # every path, valid or not, breadth first
        first, codes, there = trie.children(level, torch.from_numpy(nodes))
        valid = {tuple(row[: level + 1]) for row in rows}
        after_each = {prefix: sorted(v[-1] for v in valid if v[:-1] == prefix) for prefix in prefixes}
        assert codes.shape == there.shape == (len(nodes), max(map(len, after_each.values())))
        assert [c[t].tolist() for c, t in zip(codes, there, strict=True)] == list(after_each.values())
        assert first.dtype == codes.dtype == torch.int64 and ((codes >= 0) & (codes < size)).all()
        every = np.arange(-1, size + 1)  # those just outside the level too
        after = step(trie, level, np.repeat(nodes, len(every)), np.tile(every, len(nodes)))
        prefixes = [(*prefix, code) for prefix in prefixes for code in every.tolist()]
        assert (after >= 0).tolist() == [prefix in valid for prefix in prefixes]
        real = after[after >= 0]
        assert sorted(set(real.tolist())) == list(range(len(valid)))  # each prefix its own node, numbered in order
        keep = np.append(np.flatnonzero(after >= 0), np.flatnonzero(after < 0)[:3])  # and a few that are no node
        nodes, prefixes = after[keep], [prefixes[i] for i in keep]
    item_of = {tuple(row): item for item, row in enumerate(rows)}
    found = trie.items(torch.from_numpy(nodes)).tolist()
    assert found == [item_of.get(prefix, -1) for prefix in prefixes]
    assert len(set(found) - {-1}) == len(rows)


def test_an_empty_beam_is_no_special_case() -> None:
    trie, none = Trie.of(build(clustered(20), 3, 4)).on("cpu"), torch.empty(0, dtype=torch.int64)
    assert [len(x) for x in trie.children(1, none)] == [0, 0, 0] and not len(trie.items(none))


def test_a_trie_is_as_small_as_it_says() -> None:
    items = 20_000
    ids = build(clustered(items), 3, 32)
    trie = Trie.of(ids)
    inner = [len(np.unique(ids.codes[:, :level], axis=0)) for level in (1, 2)]
    assert trie.nbytes == 4 * items + 4 * (sum(inner) + items) + 8 * (1 + sum(inner)) + 8 * 3


@pytest.mark.parametrize("seed", range(3))
def test_each_level_leaves_less_over(seed: int) -> None:
    vectors = clustered(600, dim=4, clusters=20, spread=0.3, seed=seed)
    codes, books = residual_kmeans(vectors, (16, 16, 16), seed)
    rest = vectors - vectors.mean(axis=0)
    errors = [float((rest**2).mean())]
    rest = vectors.copy()
    for level, book in enumerate(books):
        rest -= book[codes[:, level]]
        errors.append(float((rest**2).mean()))
    # 16 codes for 20 clusters take most of what is between clusters. Then 16 codes in 4 dimensions, 2 along each, take
    # two thirds of what is in them. The last level has to be unique too, which costs: with 7 tuples an item it helps,
    # with nearly all of them taken an item's last code says little of where it is.
    assert errors[1] < 0.4 * errors[0] and errors[2] < 0.7 * errors[1] and errors[3] < errors[2], errors


def test_near_vectors_share_first_codes() -> None:
    rng = np.random.default_rng(1)
    one = clustered(1000, dim=8, clusters=16, spread=0.3)
    other = one + 0.01 * rng.standard_normal(one.shape, np.float32)
    first = build(np.concatenate([one, other]), 3, 16).codes[:, 0]
    near = float((first[:1000] == first[1000:]).mean())
    random = float((first[:1000] == first[1000 + rng.permutation(1000)]).mean())
    # A pair is 0.03 apart, a thirtieth of the 0.85 that items are from their cluster's centre: few are on both sides of
    # a border, and few leave a code for want of room: 2000 items, 256 a code. Random pairs share one of 16 by chance.
    assert near > 0.9 and random < 0.25


@pytest.mark.parametrize("kind", ["identical", "two", "random"])
@pytest.mark.parametrize("items, levels, codes", [(27, 3, 3), (26, 3, 3), (256, 2, 16), (64, 6, 2), (7, 1, 7)])
def test_every_tuple_can_be_taken(items: int, levels: int, codes: int, kind: str) -> None:
    vectors = np.random.default_rng(0).standard_normal((items, 4), np.float32)
    vectors = {"identical": np.ones_like(vectors), "two": np.sign(vectors[:, :1]) * np.ones(4, np.float32)}.get(
        kind, vectors
    )
    ids = build(vectors, levels, codes)
    assert len(np.unique(ids.codes, axis=0)) == items


def test_the_nearest_stay_and_the_others_move_next_door() -> None:
    # 6 items crowd at 0, the last of them farthest from it; 2 each are at 10 and 20. A first code has room for 4.
    line = [0, 0.01, 0.02, 0.03, 0.5, 0.6, 10, 10.1, 30, 30.1]
    vectors = np.array(line, np.float32)[:, None]
    codes, books = residual_kmeans(vectors, (4, 4), 3)
    nearest = np.abs(vectors - books[0].T).argsort(axis=1)
    members = [np.flatnonzero(nearest[:, 0] == code) for code in range(4)]
    for code, own in enumerate(members):
        distance = np.abs(vectors[own, 0] - books[0][code, 0])
        stay = own[distance.argsort(kind="stable")][:4]
        assert (codes[stay, 0] == code).all()  # those nearest to it
    assert np.bincount(codes[:, 0], minlength=4).max() <= 4


def test_the_last_code_is_the_nearest_free_one() -> None:
    vectors = np.repeat(np.array([[0.0], [100.0]], np.float32), [3, 1], axis=0)
    vectors = np.concatenate([vectors, np.linspace(40, 60, 12, dtype=np.float32)[:, None]])
    codes, books = residual_kmeans(vectors, (4, 8), 0)
    rest = vectors - books[0][codes[:, 0]]
    gaps = np.abs(rest - books[1].T)
    same = codes[:3]
    assert (same[:, 0] == same[0, 0]).all()  # equal items, one prefix
    others = {int(code) for first, code in codes[3:] if first == same[0, 0]}
    free = [code for code in gaps[0].argsort(kind="stable").tolist() if code not in others]
    assert sorted(gaps[0, same[:, 1]]) == pytest.approx(sorted(gaps[0, free[:3]]), abs=1e-4)


def test_many_equal_items_try_more_codes_than_one_list_of_near_ones() -> None:
    ids = build(np.zeros((4000, 3), np.float32), 2, 64)  # 4096 tuples; NEAR is 16
    assert len(np.unique(ids.codes, axis=0)) == 4000


def test_the_same_seed_gives_the_same_ids() -> None:
    vectors = clustered(5000, seed=4)
    one, again, other = (build(vectors, 3, 24, seed).codes for seed in (7, 7, 8))
    assert (one == again).all() and (one != other).any()
    assert (clustered(5000, seed=4) == vectors).all() and (clustered(5000, seed=5) != vectors).any()


def test_a_sample_stands_for_a_large_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grengines.semantic.quantise.SAMPLE", 500)
    monkeypatch.setattr("grengines.semantic.quantise.DISTANCES", 1000)  # and blocks are small, the last one shorter
    monkeypatch.setattr("grengines.semantic.quantise.CROWDED", 1000)
    seen: list[tuple[int, int]] = []
    ids = build(clustered(7001, spread=0.1), 3, 20, progress=lambda done, rows: seen.append((done, rows)))
    assert len(np.unique(ids.codes, axis=0)) == 7001
    assert seen == sorted(seen) and seen[-1] == (3 * 7001, 3 * 7001)


@pytest.mark.parametrize(
    "vectors, levels, codes, expected",
    [
        (np.ones((28, 2), np.float32), 3, 3, "27 tuples for 28 items; use at least 4 codes, or 4 levels of 3 codes"),
        (np.ones((2, 2), np.float32), 3, 1, "1 tuples for 2 items; use at least 2 codes$"),
        (np.ones((2, 2), np.float32), 0, 4, "at least 1"),
        (np.ones((2, 2), np.float32), 9, 256, "at least 1, with .* up to"),
        (np.ones((2, 2)), 3, 4, r"float32 \[items, d\], got float64 \[2, 2\]"),
        (np.ones((0, 2), np.float32), 3, 4, r"got float32 \[0, 2\]"),
        (np.array([[1.0], [np.nan]], np.float32), 3, 4, "finite"),
        (np.array([[1.0], [np.inf]], np.float32), 3, 4, "finite"),
    ],
)
def test_what_build_refuses(vectors: Any, levels: int, codes: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        build(vectors, levels, codes)


@examples(100)
@given(st.integers(1, 10_000_000), st.integers(1, 5))
def test_proposed_codes_leave_room(items: int, levels: int) -> None:
    codes = propose_codes(items, levels)
    assert codes**levels >= SPARE * items
    assert codes == 1 << (codes.bit_length() - 1) and (codes == 1 or (codes // 2) ** levels < SPARE * items)


def test_proposals_and_what_they_refuse() -> None:
    assert [propose_codes(n) for n in (1682, 1_000_000, 10_000_000)] == [32, 256, 512]
    with pytest.raises(ValueError, match="at least 1"):
        propose_codes(0)


@pytest.mark.parametrize(
    "codes, sizes, expected",
    [
        ([[0, 1], [1, 0], [0, 1]], (2, 2), "items 0 and 2 have the same codes"),
        ([[0, 2]], (2, 2), "level 1 has codes 0 to 1, got 2 to 2"),
        ([[-1, 0]], (2, 2), "level 0 has codes 0 to 1, got -1 to -1"),
        ([[0, 0]], (2,), "as many sizes"),
        ([[0]], (1 << 63,), "as many sizes"),
        ([0], (1,), "int32"),
    ],
)
def test_codes_that_are_no_ids(codes: list[Any], sizes: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SemanticIds(np.array(codes, np.int32), sizes)


def test_items_and_tokens_of_other_forms() -> None:
    ids = SemanticIds(np.array([[0, 1], [1, 0]], np.int32), (2, 2))
    assert ids.tokens([]).shape == (0, 2) and ids.items(np.empty((0, 2))).shape == (0,)
    for item in (-1, 2):
        with pytest.raises(IndexError, match="items must be 0 to 1"):
            ids.tokens([item])
    with pytest.raises(ValueError, match=r"tokens must be \[n, 2\]"):
        ids.items([[0, 1, 2]])


@given(catalogues())
@examples(20)
def test_saved_ids_come_back(tmp_path_factory: pytest.TempPathFactory, ids: SemanticIds) -> None:
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    ids.save(path)
    again = SemanticIds.load(path, len(ids.codes))
    assert again.sizes == ids.sizes and again.codes.dtype == np.int32 and (again.codes == ids.codes).all()
    with pytest.raises(ValueError, match=f"ids.safetensors: written for {len(ids.codes)} items, the catalogue has 999"):
        SemanticIds.load(path, 999)


def test_files_that_are_no_ids(tmp_path: Path) -> None:
    codes = np.array([[0, 1], [1, 0]], np.int32)
    path = tmp_path / "ids.safetensors"
    SemanticIds(codes, (2, 2)).save(path)
    good = path.read_bytes()
    form = "grbench-semantic-ids-1"

    def schema(**changes: Any) -> dict[str, str]:
        fields = {"items": 2, "levels": 2, "sizes": [2, 2], "dtype": "I32"} | changes
        return {"format": form, "schema": json.dumps(fields)}

    def write(tensors: dict[str, Any], metadata: dict[str, str] | None) -> bytes:
        save_file(tensors, path, metadata=metadata)
        return path.read_bytes()

    mine = {"codes": codes}
    bad = {
        "cut": (good[:-3], "not a readable safetensors file"),
        "empty": (b"", "not a readable safetensors file"),
        "pickle": (b"\x80\x04K\x01.", "not a readable safetensors file"),
        "foreign": (write({"weight": codes}, None), "not a file of semantic ids .*weight"),
        "other format": (write(mine, {"format": "x"}), "not a file of semantic ids"),
        "more": (write({**mine, "more": codes}, schema()), "not a file of semantic ids"),
        "no schema": (write(mine, {"format": form}), "no schema"),
        "list": (write(mine, {"format": form, "schema": "[1]"}), "no schema"),
        "sizes null": (write(mine, schema(sizes=None)), "no schema"),
        "sizes": (write(mine, schema(sizes=[2, 2, 2])), "its schema says"),
        "sizes text": (write(mine, schema(sizes=["2", 2])), "whole numbers"),
        "items": (write(mine, schema(items=3)), "its schema says"),
        "dtype": (write({"codes": codes.astype(np.int64)}, schema()), "its schema says"),
        "declared": (write({"codes": codes.astype(np.int64)}, schema(dtype="I64")), "its schema says"),
        "flat": (write({"codes": codes.reshape(-1)}, schema()), "its schema says"),
        "range": (write(mine, schema(sizes=[2, 1])), "level 1 has codes 0 to 0"),
        "twice": (write({"codes": codes[[0, 0]]}, schema()), "items 0 and 1 have the same codes"),
    }
    for name, (content, expected) in bad.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=expected) as caught:
            SemanticIds.load(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value), name
    path.unlink()
    with pytest.raises(ValueError, match="no such file"):
        SemanticIds.load(path)
    with pytest.raises(OSError, match="can't write"):
        SemanticIds(codes, (2, 2)).save(tmp_path / "nowhere" / "ids.safetensors")


@FEW
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=40),
    dim=st.integers(1, 12),
    weighted=st.booleans(),
)
def test_vectors_of_any_interactions(pairs: list[tuple[int, int]], dim: int, weighted: bool) -> None:
    users, items = np.array(pairs, np.int64).reshape(-1, 2).T
    weights = (np.arange(len(pairs)) % 3 / 2).astype(np.float32) if weighted else None
    vectors = from_interactions(users, items, 10, dim, weights)
    assert vectors.shape == (10, dim) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    length = np.linalg.norm(vectors, axis=1)
    known = set(items.tolist() if weights is None else items[weights > 0].tolist())
    untouched = [item for item in range(10) if item not in known]
    assert (length[untouched] < 5 * UNTOUCHED).all()
    assert len(np.unique(vectors[untouched], axis=0)) == len(untouched)  # spread, for k-means
    assert (vectors == from_interactions(users, items, 10, dim, weights)).all()


def test_items_of_the_same_people_are_near() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(100, size=4000)
    items = users % 4 * 10 + rng.integers(10, size=4000)  # four kinds of people, each with its ten items
    vectors = from_interactions(users, items, 41, dim=4)
    cosine = vectors[:40] @ vectors[:40].T
    same = np.arange(40)[:, None] // 10 == np.arange(40) // 10
    assert cosine[same].min() > 0.9 and cosine[~same].max() < 0.1
    assert 0 < np.linalg.norm(vectors[40]) < 0.5


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"items": np.array([0, 5])}, "items 0 to 4"),
        ({"users": np.array([-1, 0])}, "users are 0 or more"),
        ({"users": np.array([0])}, "must be equally long"),
        ({"weights": np.array([0, np.nan])}, "finite"),
        ({"dim": 0}, "at least 1"),
    ],
)
def test_interactions_that_are_refused(change: dict[str, Any], expected: str) -> None:
    good: dict[str, Any] = {"users": np.array([0, 1]), "items": np.array([0, 4]), "num_items": 5}
    with pytest.raises(ValueError, match=expected):
        from_interactions(**(good | change))
    with pytest.raises(ValueError, match="at least 1"):
        clustered(0)


def test_movielens_items_get_their_own_ids() -> None:
    try:
        path = movielens.ml_100k()
    except loaders.DataError as e:
        pytest.skip(str(e))
    events = loaders.load_recbole(path, sort=True)
    vectors = from_interactions(events.users, events.items, events.num_items, weights=events.weights)
    for codes in (256, propose_codes(events.num_items), 12):  # 12 ** 3 is 1728
        ids = build(vectors, codes=codes)
        assert len(np.unique(ids.codes, axis=0)) == events.num_items == 1682
        trie, nodes = Trie.of(ids).on("cpu"), np.zeros(1682, np.int64)
        for level in range(3):
            nodes = step(trie, level, nodes, ids.codes[:, level])
        assert trie.items(torch.from_numpy(nodes)).tolist() == list(range(1682))


def test_ids_are_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 20, 300), rng.integers(0, 50, 300)
    options = {"levels": 3, "codes": 4, "seed": 1}
    made = id_cache.of_interactions(users, items, 50, **options)
    assert (made.codes == build(from_interactions(users, items, 50, seed=1), 3, 4, 1).codes).all()
    (path,) = (tmp_path / "semantic_ids").iterdir()

    def refuse(*_: Any) -> Any:
        raise AssertionError("made again")

    with monkeypatch.context() as kept_ones:
        kept_ones.setattr(id_cache, "build", refuse)
        assert (id_cache.of_interactions(users, items, 50, **options).codes == made.codes).all()
        for other in (
            (users[::-1], items, 50, options),
            (users, items, 51, options),
            (users, items, 50, {**options, "seed": 2}),
        ):
            with pytest.raises(AssertionError, match="made again"):
                id_cache.of_interactions(*other[:3], **other[3])
        with pytest.raises(AssertionError, match="made again"):
            id_cache.of_made_up(50, **options)
    whole = path.read_bytes()
    changed = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    for damaged in (whole[:-3], changed):  # made again, and whole again
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="build the ids again"):
            SemanticIds.load(path)
        assert (id_cache.of_interactions(users, items, 50, **options).codes == made.codes).all()
        assert (SemanticIds.load(path).codes == made.codes).all()
    (tmp_path / "probe").touch()
    assert path.stat().st_mode == (tmp_path / "probe").stat().st_mode  # others who share the cache may read it
    seen: list[tuple[int, int]] = []
    assert len(id_cache.of_made_up(50, **options, progress=lambda done, rows: seen.append((done, rows))).codes) == 50
    assert seen[-1] == (150, 150) and len(list((tmp_path / "semantic_ids").iterdir())) == 2
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"file/semantic_ids.*Not a directory; set GRBENCH_CACHE"):
        id_cache.of_made_up(50, **options)


def test_without_a_home_folder_the_cache_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GRBENCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match="no home folder; set GRBENCH_CACHE"):
        cache_dir.cache_folder()
    assert not cache_dir.in_cache("/tmp/x")
    monkeypatch.setenv("GRBENCH_CACHE", "/tmp/cache")
    assert cache_dir.in_cache("/tmp/cache/plans/a") and not cache_dir.in_cache("/tmp/x")


def test_a_hundred_thousand_items_in_seconds() -> None:
    ids = build(clustered(100_000, dim=16), codes=propose_codes(100_000))  # about 2 s on 2 cores
    assert len(ids.codes) == 100_000
