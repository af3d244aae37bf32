"""Step times: what adds up, what grows how, and which layouts are taken."""

import json
from dataclasses import replace

import pytest

from rmoe_megablocks import cli
from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.launcher.config import load_config, to_argv
from rmoe_megablocks.planning.counts import flops, memory, traffic
from rmoe_megablocks.planning.plan import divisions
from rmoe_megablocks.planning.scale import cost, hardware, search
from rmoe_megablocks.planning.settings import read_settings

CONFIG = "configs/rmoe_0.9b_8xa100.yaml"
A100 = hardware.HARDWARE["a100-80g"]


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    """Hundreds of them take seconds."""
    monkeypatch.setattr(search, "_VIRTUAL", (1,))
    monkeypatch.setattr(search, "_MICRO_BATCHES", (1, 4))


@pytest.fixture(scope="module")
def settings():
    return read_settings(to_argv(load_config(CONFIG).arguments))


def test_one_rank_a_replica_is_compute_routing_and_gradients(settings):
    time, found = cost.step_time(settings, 8, A100), flops.flops(settings)
    tokens = settings.global_batch_size * settings.seq_length / 8
    products = found.training - found.routing - found.routing_backward
    assert time.compute == pytest.approx(tokens * products / (A100.flops * A100.compute), rel=1e-9)
    bytes_of_a_layer = cost.routing_bytes(settings, False) + cost.routing_bytes(settings, True)
    by_bytes = tokens * settings.num_layers * bytes_of_a_layer / (A100.bandwidth * A100.reached)
    assert time.routing >= by_bytes * (1 - 1e-12)
    assert time.tensor == time.expert == time.state == time.shared == 0 and time.bubble < 1e-9
    hidden = time.data + traffic.traffic(settings, 8).data_parallel / (A100.link * A100.reached)
    assert hidden >= time.data >= 0 and time.total == pytest.approx(time.compute + time.routing + time.data)


def test_the_router_takes_nanoseconds_a_token_and_layer(settings):
    """Of the order of the published 14.5 ns on an A100 (a naive form), above what its memory can read at all."""
    ours, plain = (cost.step_time(s, 8, A100) for s in (settings, cost.without_router(settings)))
    token_layers = settings.global_batch_size * settings.seq_length * settings.num_layers / 8
    extra = 1e9 * (ours.total - plain.total) / token_layers
    assert 2 < extra < 14.5


def test_the_state_costs_its_share_of_a_message(settings):
    deep = replace(settings, pipeline=8, micro_batch_size=1)
    slow = replace(A100, network=1e8, link=1e8, latency=1e-9)
    time = cost.step_time(deep, 64, slow)
    narrow = cost.step_time(cost.without_router(deep), 64, slow)
    wide = settings.hidden_size * 2 + settings.routing.state_size * max(2, settings.router_dtype_bytes)
    assert time.state > 0 and time.shared > 0 and narrow.state == narrow.shared == 0
    share = 1 - settings.hidden_size * 2 / wide
    assert time.state / time.bubble == pytest.approx(share, rel=0.35), "the messages rule where the network is slow"


def test_stages_of_one_node_use_its_links_and_those_of_two_the_network(settings):
    deep = replace(settings, pipeline=8, micro_batch_size=1)
    for world, quick, slow in ((8, "network", "link"), (64, "link", "network")):
        plain, slower = cost.step_time(deep, world, A100), cost.step_time(deep, world, replace(A100, **{slow: 1e9}))
        other = cost.step_time(deep, world, replace(A100, **{quick: 1e12}))
        assert slower.bubble > plain.bubble == other.bubble and slower.shared > plain.shared == other.shared


def test_found_layouts_fit_and_divide(settings):
    small = replace(A100, memory=24.0)
    for nodes in (1, 4):
        found = search.best(settings, nodes, small)
        assert not divisions(found.settings, nodes * 8)
        assert found.memory == memory.fullest(found.settings, nodes * 8).total <= memory.usable(24.0)
        assert found.settings.global_batch_size == settings.global_batch_size


def test_a_batch_that_no_layout_divides_is_rounded_up(settings):
    odd = replace(settings, global_batch_size=1121)
    found = search.best(odd, 16, A100)  # 128 ranks, of which TP x PP takes 32 at most
    assert found.settings.global_batch_size == 1124 and not divisions(found.settings, 128)


def test_nothing_fits_into_too_little(settings):
    assert search.best(settings, 1, replace(A100, memory=3.0)) is None


def test_counts_of_nodes():
    assert search.node_counts("1:10") == [1, 2, 4, 8, 10] and search.node_counts("3,1") == [3, 1]
    for text in ("0", "2:1", "a", "1:"):
        with pytest.raises(ValueError):
            search.node_counts(text)


def test_hardware_of_ones_own():
    found = hardware.parse("h100-80g,network=12.5e9,gpus=4")
    assert found.network == 12.5e9 and found.gpus == 4 and found.flops == 989e12
    for text, told in (
        ("b200", "--hardware b200: known are a100-80g, h100-80g"),
        ("a100-80g,flop=1", "'flop' is none of"),
        ("a100-80g,compute=2", "shares at most 1"),
        ("a100-80g,memory=x", "memory must be a number above 0"),
    ):
        with pytest.raises(UsageError, match=told):
            hardware.parse(text)


def test_the_command(capsys):
    assert cli.main(["plan", CONFIG, "--nodes", "1,2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["world_size"] for one in found["estimates"]] == [8, 16] and not found["warnings"]
    parts = found["estimates"][0]["seconds"]
    assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k not in ("total", "state")))
    assert cli.main(["plan", CONFIG, "--nodes", "1"]) == 0
    text = capsys.readouterr().out
    assert "estimates, no GPU was asked" in text and "1 nodes: DP8" in text and max(map(len, text.splitlines())) <= 80
    assert cli.main(["plan", CONFIG, "--nodes", "x"]) == 2
    assert "--nodes x: expected N, N,M,... or FIRST:LAST" in capsys.readouterr().err
