"""The push to the Hugging Face Hub: in the background, and never at the expense of the run.

Only what belongs to the model is sent: weights, configurations, card, curves, metrics and results.
"""

import json
import logging
import os
import queue
import shutil
import tempfile
import threading
import time
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from transformers import TrainerCallback, TrainingArguments

from w2v2.errors import UserError, hide_secrets, one_line
from w2v2.evaluate.plots import FINETUNING_PICTURES, draw_plots
from w2v2.hub.card import publishable, write_finetuned_card
from w2v2.train.log import read_metrics

logger = logging.getLogger(__name__)

PUBLISHED = ("*.safetensors", "*.json", "*_config.yaml", "README.md", "LICENSE", "metrics.jsonl", "plots/*.png")
UNPUBLISHED = ("optimizer*", "trainer_state*", "plan.json", "dry_run.json")
NAMES_PATHS = ("pretrain_config.yaml", "finetune_config.yaml", "results.json")  # sent without tokens and paths
SILENCE_SECONDS = 300  # of the Hub, after which a request has failed; huggingface_hub itself would wait for ever
_STAGED = ".hub_push-"


class HubPusher:
    """Pushes folders to one Hub repository, one at a time, on a thread that can neither stop nor hold up the run.

    Files are set aside at once, so rotation may delete the original. huggingface_hub itself retries requests; its
    `run_as_future` is not used, since Python waits for those threads at its end, however long a connection is dead.
    """

    def __init__(self, args):
        """Start to create the repository, so that a refused token shows in the first minute of the run.

        `args` are flags with `output_dir`, `hub_model_id` (default: the folder's name), `hub_private_repo` (False: as
        the account's default says) and `hub_strategy`. Raises UserError where `hub_model_id` can name no repository.
        """
        self._output_dir = Path(args.output_dir).resolve()
        self._repo_id = args.hub_model_id or self._output_dir.name
        try:
            validate_repo_id(self._repo_id)
        except HFValidationError as error:
            raise UserError(f"--hub_model_id {self._repo_id}: {one_line(error)}; give it as user/name") from None
        self._private, self._every_save = args.hub_private_repo or None, args.hub_strategy != "end"
        self._jobs: queue.Queue = queue.Queue()  # (staged folder, message); None ends the thread
        self._pushed_to: str | None = None  # the address, if the last push arrived
        disable_progress_bars()  # they would tear the run's own bar
        self._output_dir.mkdir(parents=True, exist_ok=True)
        for left_over in self._output_dir.glob(f"{_STAGED}*"):  # of a killed run
            shutil.rmtree(left_over, ignore_errors=True)
        self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
        self._thread.start()

    def push(self, folder: str | os.PathLike, message: str) -> None:
        """Push the folder's publishable files; a checkpoint is not pushed while another push is under way."""
        folder = Path(folder).resolve()
        if folder != self._output_dir and (self._jobs.unfinished_tasks or not self._every_save):
            return
        try:
            self._jobs.put((set_aside(folder, self._output_dir), message))
        except OSError as error:
            self._warn(f"cannot push {folder.name}", error)

    def finish(self, timeout_seconds: float = 300) -> str | None:
        """Wait for the pushes, at most so long; the repository's address if the last one arrived."""
        self._jobs.put(None)
        self._thread.join(timeout_seconds)
        if not self._thread.is_alive():
            return self._pushed_to
        self._warn(f"given up after {timeout_seconds:.0f} s", TimeoutError("all files are in the output_dir"))

    def _work(self) -> None:
        """Create the repository, then push one folder after the other."""
        api, job = HfApi(), (None, "")
        while job:
            (staged, message), self._pushed_to = job, None
            try:
                get_session().timeout = SILENCE_SECONDS
                url = api.create_repo(self._repo_id, private=self._private, exist_ok=True)
                self._repo_id = url.repo_id
                if staged:
                    api.upload_folder(repo_id=self._repo_id, folder_path=staged, commit_message=message)
                    self._pushed_to = str(url)
            except BaseException as error:  # a panic in the transfer library is no Exception
                self._warn("the push failed" if staged else "cannot create the repository", error)
            if staged:
                shutil.rmtree(staged, ignore_errors=True)
                self._jobs.task_done()
            job = self._jobs.get()

    def _warn(self, what: str, error: BaseException) -> None:
        why = hide_secrets(f"{type(error).__name__}: {one_line(error)}")[:300]
        logger.warning("Hub: %s (%s): %s; the run goes on", what, self._repo_id, why)


def set_aside(folder: Path, output_dir: Path) -> Path:
    """Copy the publishable files to a new folder in `output_dir`; weights, which never change, are linked."""
    staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=output_dir))
    for path in (path for pattern in PUBLISHED for path in folder.glob(pattern)):
        if any(path.match(pattern) for pattern in UNPUBLISHED):
            continue
        target = staged / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        try:
            (os.link if path.suffix == ".safetensors" else shutil.copyfile)(path, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, target)
        if path.name in NAMES_PATHS:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                text = json.dumps(publishable(json.loads(text)), indent=2, ensure_ascii=False)
            else:
                text = yaml.safe_dump(publishable(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
            target.write_text(text, encoding="utf-8")
    return staged


class HubCallback(TrainerCallback):
    """The same for `Trainer`: checkpoints as they are saved (unless `hub_strategy` is `end`), the folder at the end.

    Make it before the `Trainer`: it switches `args.push_to_hub` off, as `Trainer`'s own push ends a run whose token is
    refused, and waits without limit at the end.
    """

    def __init__(self, args: TrainingArguments):
        self.pusher = HubPusher(args) if args.push_to_hub and args.process_index == 0 else None
        self._started = self._device_hours = None
        args.push_to_hub = False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # of a resumed run the first part was not measured
            self._started = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        if self._started:
            self._device_hours = (time.perf_counter() - self._started) / 3600 * args.world_size

    def on_save(self, args, state, control, **kwargs):
        if self.pusher:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            self.pusher.push(folder, f"Weights after {state.global_step} updates")

    def hand_over(self, args: TrainingArguments) -> None:
        """Card and curves from `results.json` and `metrics.jsonl`, then the last push. Call it on every rank."""
        if args.process_index != 0:
            return
        folder = Path(args.output_dir)
        log = folder / "metrics.jsonl"
        draw_plots(folder, read_metrics(log) if log.exists() else [], FINETUNING_PICTURES, over=("step", "update"))
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        config = vars(args) | args.describe_sources()
        config |= {"world_size": args.world_size, "device_hours": self._device_hours}
        write_finetuned_card(folder, config=config, results=results)
        if self.pusher:
            self.pusher.push(folder, "Fine-tuned model")
            print(f"   pushed to: {self.pusher.finish() or 'nowhere: see the warnings above'}", flush=True)
