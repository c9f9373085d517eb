"""The floors of every kernel: counted by hand, and current on their page."""

import pytest

from bench import command, floors


def work(name):
    everything = [*floors.attention_work(), *floors.row_work(), *floors.decode_work()]
    return next(w for w in everything if w.kernel == name)


def test_attention_forward_counted_by_hand():
    """16 x 12 heads: half of 4 T^2 D FLOP, four (T, D) tensors of 2 bytes and lse of 4, half of T^2 exponentials."""
    forward = work("attention forward")
    assert forward.flops == 192 * 2 * 1024**2 * 64
    assert forward.bytes == 192 * (4 * 1024 * 64 * 2 + 1024 * 4)
    assert forward.exponentials == 192 * 1024**2 / 2
    h100 = floors.Gpu("", 989e12, 3.35e12, 3.87e12)
    assert floors.floors(forward, h100) == pytest.approx((26.06, 30.28, 26.01), rel=1e-3)


def test_separate_backward_kernels_do_seven_products_for_five():
    separate = work("attention backward: dK, dV").flops + work("attention backward: dQ").flops
    assert separate / work("attention backward, if fused").flops == 7 / 5


def test_norms_read_and_write_every_element_once():
    stream = 16 * 1024 * 768 * 2
    assert work("LayerNorm forward").bytes == pytest.approx(2 * stream, rel=0.01)
    assert work("LayerNorm backward").bytes == pytest.approx(3 * stream, rel=0.01)


def test_the_page_shows_the_current_table():
    page = floors.PAGE.read_text()
    assert floors.insert(page, floors.markdown()) == page, "run python bench/floors.py --write"


def test_write_replaces_only_what_stands_between_the_markers(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{floors.BEGIN}\nold\n{floors.END}\nafter\n")
    monkeypatch.setattr(floors, "PAGE", page)
    assert command.run(floors.main, ["--write"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| attention forward | 25.8 | 101.4 | **82.6** / 49.8 / 41.3 |" in text


def test_without_write_the_table_is_printed(capsys):
    assert command.run(floors.main, []) == 0
    assert "| LayerNorm forward | - | 50.5 |" in capsys.readouterr().out
