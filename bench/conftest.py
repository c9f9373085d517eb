"""pytest-benchmark for bench/ratios.py: its unit, and of the machine only what matters."""


def pytest_benchmark_scale_unit(config, unit, benchmarks, best, worst, sort):
    """Times are multiples of a stock op: the table's heading reads "time in stock ops"."""
    return "stock op", 1.0


def pytest_benchmark_update_machine_info(config, machine_info):
    kept = {name: machine_info[name] for name in ("system", "machine", "python_version")}
    kept["cpu"] = {"brand_raw": machine_info.get("cpu", {}).get("brand_raw", "")}
    machine_info.clear()
    machine_info.update(kept)
