"""Write one HTML page about one or several runs: curves, figures, errors, flags and events.

    python report.py runs/small
    python report.py runs/small runs/larger --output comparison.html

RUN is the output_dir of pretrain.py, finetune_ctc.py, finetune_classification.py, probe.py or verify_speakers.py,
finished or not. The page needs no network and runs no script. A run writes its own at its end, as report.html.
"""

import w2v2  # noqa: F401  # isort: skip  # before torch: sets how OpenMP's threads wait

from pathlib import Path

from w2v2.arguments import PretrainArguments
from w2v2.cli import run_script
from w2v2.errors import Parser, number
from w2v2.report.page import REPORT_FILE, find_defaults, write_report


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the output_dir of a run")
    parser.add_argument(
        "--output", help=f"the page (default: {REPORT_FILE} in the run's folder; of several runs, here)"
    )
    parser.add_argument("--embed_audio", type=number(int, min=0, max=100), default=0, metavar="N",
                        help="let the N worst utterances of a fine-tuning be heard in the page")  # fmt: skip
    args = parser.parse_args(argv)
    output = Path(args.output or Path(args.runs[0] if len(args.runs) == 1 else ".", REPORT_FILE))
    write_report(args.runs, output, find_defaults(PretrainArguments), args.embed_audio)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run_script(main)
