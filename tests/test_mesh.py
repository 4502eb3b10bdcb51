"""Placement, transfers and views: bookkeeping, against the rules it must keep."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mesh.m2n import (
    RingTransport,
    StageTransport,
    exchange_in_group,
    forward_pairs,
    pick_slots,
    picked_slots,
)
from mesh.placement import ALL_DEVICES, ExpertPlaces, Meshes, Placement, Whoami
from mesh.roles import Role
from mesh.views import rewrap, role_views, union_view
from mesh.wire import WordCodec

placements = st.builds(
    Placement, st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)
)
ON_EIGHT = [
    Placement(1, 1, 1, 1), Placement(1, 2, 2, 2), Placement(1, 1, 3, 5), Placement(1, 4, 1, 1),
    Placement(1, 1, 7, 1), Placement(2, 2, 1, 1), Placement(1, 2, 1, 3), Placement(2, 1, 3, 1),
]  # fmt: skip


def sizes_of(placement):
    return {Role.ATTENTION: placement.attention_workers, Role.EXPERT: placement.expert_workers}


def every_worker(placement):
    """(stage, role, rank) of all workers, in worker order."""
    for stage in range(placement.stages):
        for role in Role:
            for rank in range(sizes_of(placement)[role]):
                yield stage, role, rank


def describe(placement, worker):
    """(stage, role, rank) of a disaggregated worker."""
    ranks = {role: placement.rank_of(worker, role) for role in Role}
    ((role, rank),) = ((role, rank) for role, rank in ranks.items() if rank is not None)
    return placement.stage_of(worker), role, rank


@functools.cache
def meshes_of(placement):
    return Meshes.make(placement, jax.devices()[: placement.num_devices])


def on_workers(placement, function, *arrays):
    """`function` of each worker's own rows of arrays [W, ...], stacked to [W, ...] again."""
    spec = PartitionSpec(ALL_DEVICES)
    mapped = jax.shard_map(
        lambda *own: jax.tree.map(lambda x: x[None], function(*(x[0] for x in own))),
        mesh=meshes_of(placement).union, in_specs=spec, out_specs=spec, check_vma=False,
    )  # fmt: skip
    return jax.device_get(jax.jit(mapped)(*arrays))


# Placement


@settings(deadline=None)
@given(placements)
def test_stage_and_rank_are_the_inverse_of_worker(placement):
    described = [describe(placement, worker) for worker in range(placement.workers)]
    assert described == list(every_worker(placement))
    assert [placement.worker(*who) for who in described] == list(range(placement.workers))
    assert placement.num_devices == placement.replicas * placement.workers


@settings(deadline=None)
@given(placements)
def test_groups_are_partitions_and_share_no_group_of_several_devices(placement):
    partitions = placement.role_groups(), placement.stage_groups()
    for partition in partitions:
        assert sorted(itertools.chain(*partition)) == list(range(placement.workers))
    several = [{tuple(g) for g in groups if len(g) > 1} for groups in partitions]
    assert not several[0] & several[1]
    for groups, part in zip(partitions, (slice(2), slice(1)), strict=True):
        for group in groups:
            assert len({describe(placement, worker)[part] for worker in group}) == 1


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_groups_of_the_twin(replicas, stages, sharing, copies):
    """Every group holds each expert rank once, and copies are one worker of each group."""
    placement = Placement(replicas, stages, sharing * copies, sharing, colocated=True)
    assert placement.num_devices == replicas * stages * sharing * copies
    assert placement.expert_copies == copies
    groups, copied = placement.expert_groups(), placement.expert_copy_groups()
    for partition in (groups, copied, placement.stage_groups()):
        assert sorted(itertools.chain(*partition)) == list(range(placement.workers))
    for group in groups:
        assert [placement.rank_of(w, Role.EXPERT) for w in group] == list(range(sharing))
    for group in copied:
        assert len(group) == copies
        assert len({placement.rank_of(w, Role.EXPERT) for w in group}) == 1
    for group in groups + copied:
        assert len({placement.stage_of(worker) for worker in group}) == 1
    for stage, rank in itertools.product(range(stages), range(sharing * copies)):
        worker = placement.worker(stage, Role.ATTENTION, rank)
        assert placement.rank_of(worker, Role.ATTENTION) == rank


@pytest.mark.parametrize(
    "placement",
    [Placement(1, 2, 1, 3), Placement(2, 2, 1, 1), Placement(1, 2, 4, 2, colocated=True)],
    ids=str,
)
def test_whoami_describes_the_executing_worker(placement):
    def say(_):
        me = Whoami.of(placement)
        played = [jnp.where(me.plays[role], me.rank[role], -1) for role in Role]
        return jnp.stack([me.replica, me.worker, me.stage, *played])

    found = on_workers(placement, say, np.zeros(placement.num_devices))
    for index, row in enumerate(found):
        replica, worker = divmod(index, placement.workers)
        ranks = [placement.rank_of(worker, role) for role in Role]
        played = [-1 if rank is None else rank for rank in ranks]
        assert row.tolist() == [replica, worker, placement.stage_of(worker), *played]


def test_meshes_hold_each_device_in_its_roles_submesh():
    placement = Placement(2, 1, 3, 1)
    meshes = meshes_of(placement)
    for role, mesh in ((Role.ATTENTION, meshes.attention), (Role.EXPERT, meshes.expert)):
        devices = mesh.devices.reshape(2, 1, -1)
        for (replica, stage, rank), device in np.ndenumerate(devices):
            worker = placement.worker(stage, role, rank)
            assert meshes.union.devices[replica, worker] is device
    with pytest.raises(ValueError, match=r"devices = 7 must equal .* = 8"):
        Meshes.make(placement, jax.devices()[:7])


# Places of experts


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12))
def test_each_expert_has_one_place_and_shares_are_even(num_experts, num_workers):
    places = ExpertPlaces(num_experts, num_workers)
    table = places.place_experts().reshape(num_workers, places.per_worker)
    held = [row[row >= 0].tolist() for row in table]
    assert held == [list(places.share(worker)) for worker in range(num_workers)]
    assert list(itertools.chain(*held)) == list(range(num_experts))
    sizes = [len(share) for share in held]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == places.per_worker


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12))
def test_expert_places_is_the_inverse_of_place_experts(num_experts, num_workers):
    places = ExpertPlaces(num_experts, num_workers)
    experts, of_expert = places.place_experts(), places.expert_places()
    np.testing.assert_array_equal(experts[of_expert], np.arange(num_experts))
    assert (np.delete(experts, of_expert) == -1).all()
    for worker in range(num_workers):
        assert (of_expert[list(places.share(worker))] // places.per_worker == worker).all()


# Transfers


@settings(deadline=None)
@given(placements)
def test_a_round_uses_each_worker_once_and_the_rounds_every_pair_once(placement):
    rounds = forward_pairs(placement)
    assert len(rounds) == placement.rounds
    for pairs in rounds:
        assert pairs
        for end in zip(*pairs, strict=True):
            assert len(set(end)) == len(end)
    expected = set()
    for stage in range(placement.stages):
        for i, j in itertools.product(*map(range, sizes_of(placement).values())):
            expert = placement.worker(stage, Role.EXPERT, j)
            expected.add((placement.worker(stage, Role.ATTENTION, i), expert))
            next_stage = (stage + 1) % placement.stages
            expected.add((expert, placement.worker(next_stage, Role.ATTENTION, i)))
    pairs = list(itertools.chain(*rounds))
    assert set(pairs) == expected and len(pairs) == len(expected)


@settings(deadline=None)
@given(placements)
def test_slots_agree_with_the_rounds(placement):
    """Slot r of attention rank i is expert rank (i + r) mod R, and its slot r is that rank i."""
    slots = np.arange(placement.rounds)
    for r, pairs in enumerate(forward_pairs(placement)):
        for source, target in pairs:
            _, role, rank = describe(placement, source)
            other = describe(placement, target)[2]
            i, j = (rank, other) if role is Role.ATTENTION else (other, rank)
            assert j == (i + r) % placement.rounds
            assert r in pick_slots(slots, j, placement.attention_workers)
    for j in range(placement.expert_workers):
        picked = pick_slots(slots, j, placement.attention_workers)
        senders = (j - np.asarray(picked)) % placement.rounds
        assert sorted(senders) == list(range(placement.attention_workers))


@pytest.mark.parametrize(("num_senders", "rounds"), [(1, 1), (3, 3), (1, 4), (3, 5)])
def test_what_is_written_into_picked_slots_lies_where_they_were_picked(num_senders, rounds):
    words = np.arange(1, 2 * rounds + 1, dtype=np.uint16).reshape(rounds, 2)
    template = tuple(jax.ShapeDtypeStruct((1,), np.uint16) for _ in range(2))
    codec = WordCodec(template, np.float16)
    for rank in range(rounds):
        picked = pick_slots(words, rank, num_senders)
        assert picked.shape == (num_senders, 2)
        slots = picked_slots(rank, num_senders, rounds)
        written = codec.write(jnp.zeros_like(words), codec.decode(picked), slots)
        np.testing.assert_array_equal(pick_slots(written, rank, num_senders), picked)
        has_sender = (rank - np.arange(rounds)) % rounds < num_senders
        np.testing.assert_array_equal(written, np.where(has_sender[:, None], words, 0))


@pytest.mark.parametrize("placement", ON_EIGHT, ids=str)
def test_a_transfer_brings_every_slot_to_its_partner_and_back(placement):
    def there_and_back(words):
        transport = RingTransport(placement)
        arrived = transport.send_forward(words)
        return arrived, transport.send_backward(arrived)

    num_workers, rounds = placement.workers, placement.rounds
    shape = (placement.num_devices, rounds, 2)
    sent = np.arange(1, np.prod(shape) + 1, dtype=np.uint32).reshape(shape)
    arrived, returned = on_workers(placement, there_and_back, sent)
    for replica in range(placement.replicas):
        for worker, (stage, role, rank) in enumerate(every_worker(placement)):
            at = replica * num_workers + worker
            for r in range(rounds):
                if role is Role.ATTENTION:
                    other_role, partner = Role.EXPERT, (rank + r) % rounds
                else:
                    other_role, partner = Role.ATTENTION, (rank - r) % rounds
                if partner >= sizes_of(placement)[other_role]:
                    assert not arrived[at, r].any() and not returned[at, r].any()
                    continue
                from_stage = (stage - (role is Role.ATTENTION)) % placement.stages
                source = placement.worker(from_stage, other_role, partner)
                np.testing.assert_array_equal(
                    arrived[at, r], sent[replica * num_workers + source, r]
                )
                np.testing.assert_array_equal(returned[at, r], sent[at, r])


@pytest.mark.parametrize("sharing", [1, 2, 4])
def test_an_exchange_brings_slots_to_the_workers_of_the_group_and_back(sharing):
    placement = Placement(1, 2, 4, sharing, colocated=True)

    def there_and_back(words):
        arrived = exchange_in_group(words, placement)
        return arrived, exchange_in_group(arrived, placement)

    sent = np.arange(8 * sharing * 2).reshape(8, sharing, 2)
    arrived, returned = on_workers(placement, there_and_back, sent)
    np.testing.assert_array_equal(returned, sent)
    for group in placement.expert_groups():
        for place, worker in enumerate(group):
            np.testing.assert_array_equal(arrived[worker], sent[group, place])


def test_stages_pass_hidden_states_on_and_back():
    placement = Placement(1, 4, 2, 1, colocated=True)

    def there_and_back(x):
        transport = StageTransport(placement)
        arrived = transport.send_forward(x)
        return arrived, transport.send_backward(arrived)

    sent = np.arange(8.0)
    arrived, returned = on_workers(placement, there_and_back, sent)
    np.testing.assert_array_equal(arrived, np.roll(sent, 2))
    np.testing.assert_array_equal(returned, sent)


# Views


def pointers(*arrays):
    """{device: address of the buffer}"""
    shards = itertools.chain(*(array.addressable_shards for array in arrays))
    return {shard.device: shard.data.unsafe_buffer_pointer() for shard in shards}


@pytest.mark.parametrize("placement", [Placement(1, 2, 2, 2), Placement(2, 1, 1, 3)], ids=str)
def test_views_are_the_same_buffers(placement):
    meshes, stages = meshes_of(placement), placement.stages
    # What a worker's rows hold: its stage and, on an expert worker, its rank.
    of_worker = [
        10 * stage + (1 + rank if role is Role.EXPERT else 0)
        for stage, role, rank in every_worker(placement)
    ]
    host = np.tile(of_worker, placement.replicas)[:, None, None] * np.ones((1, 2, 3))
    rows = jax.device_put(host, NamedSharding(meshes.union, PartitionSpec(ALL_DEVICES)))
    attention, expert = role_views(meshes, rows)
    assert attention.shape == (stages, 2, 3)
    assert expert.shape == (stages * placement.expert_workers, 2, 3)
    np.testing.assert_array_equal(attention[:, 0, 0], 10 * np.arange(stages))
    expected = [10 * g + 1 + j for g in range(stages) for j in range(placement.expert_workers)]
    np.testing.assert_array_equal(expert[:, 0, 0], expected)
    again = union_view(meshes, attention, expert)
    assert again.sharding == rows.sharding
    np.testing.assert_array_equal(again, host)
    assert pointers(rows) == pointers(attention, expert) == pointers(again)


def test_rewrap_keeps_the_buffers_of_another_mesh_shape():
    meshes = meshes_of(Placement(1, 2, 2, 2))
    flat = NamedSharding(meshes.union, PartitionSpec(ALL_DEVICES))
    array = jax.device_put(np.arange(16.0).reshape(8, 2), flat)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    square = NamedSharding(mesh, PartitionSpec("a", "b"))
    again = rewrap([array], (2, 8), square, array.dtype)
    assert pointers(again) == pointers(array)
    np.testing.assert_array_equal(again, np.arange(16.0).reshape(2, 8))
