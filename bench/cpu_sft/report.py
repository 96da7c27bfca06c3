"""Turns the measurements that `run` collected into a table on stdout and a report in JSON."""
import argparse
import json
import statistics
from pathlib import Path


def cpu_model():
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def summary(rows, who, dtype):
    """Median over the rounds of the medians over the steps; the largest memory that any round needed."""
    results = [row["result"] for row in rows if (row["who"], row["dtype"]) == (who, dtype)]
    rates = [result["tokens_per_second"] for result in results]
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_by_round": rates,
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
        "runs": results,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding="utf-8").splitlines()]
    report = {"cpu_model": cpu_model(), "commit": arguments.commit, "config": arguments.config.name, "dtypes": {}}
    print(f"{'dtype':6} {'who':7} {'tokens/s':>9} {'peak RSS':>10}")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        ours, theirs = summary(rows, "pmetal", dtype), summary(rows, "peer", dtype)
        entry = {"pmetal": ours, "peer": theirs,
                 "speed_ratio": ours["tokens_per_second"] / theirs["tokens_per_second"],
                 "memory_ratio": ours["peak_rss_bytes"] / theirs["peak_rss_bytes"]}
        report["dtypes"][dtype] = entry
        for who, side in (("pmetal", ours), ("peer", theirs)):
            print(f"{dtype:6} {who:7} {side['tokens_per_second']:9.1f} {side['peak_rss_bytes'] / 2**30:6.2f} GiB")
        print(f"{dtype:6} ratio   {entry['speed_ratio']:9.2f} {entry['memory_ratio']:10.2f}")
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
