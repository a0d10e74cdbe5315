"""The command line: `megalite VERB ...`.

In: words.  Out: an exit code: 0, 2 for bad input (one line says value, limit and cure), 1 when a rank failed. What each verb does with
its words is in `verbs.py`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence

from megalite import config as settings
from megalite import verbs
from megalite.errors import UserError
from megalite.flags import near
from megalite.verbs import say

VERBS: dict[str, Callable[[list[str]], object]] = {
    "prepare": verbs.prepare,
    "train": verbs.train,
    "finetune": verbs.finetune,
    "evaluate": verbs.evaluate,
    "embed": verbs.embed,
    "generate": verbs.generate,
    "chat": verbs.chat,
    "verify": verbs.verify,
    "tune": verbs.tune,
    "bench": verbs.bench,
    "import": verbs.import_,
    "export": verbs.export,
    "checkpoint": verbs.checkpoint,
    "submit": verbs.submit,
    "jobs": verbs.jobs,
}

HELP = f"""usage: megalite VERB ...

Pretrain GPT and BERT with DeepSpeed ZeRO-3 together with pipeline and tensor parallelism.

  megalite prepare INPUT... --output PREFIX --tokenizer NAME|FILE|train:bpe|train:wordpiece|train:unigram
      Text into shards: files of token ids that training maps into memory.

  megalite train RECIPE|FILE.yaml [--mesh.tp 4] [--train.steps 50] ...
      Pretrain. The same command again resumes. --dry-run: say what a rank would hold and send, and train nothing.
      Recipes: {", ".join(settings.recipes())}.

  megalite finetune --task classify|regress|tag|translate|chat|lm --from MODEL --train FILE [--valid FILE] [--mesh.tp 2] ...
      A task on a pretrained trunk: a checkpoint of any mesh or a Hugging Face model, and rows of .tsv .csv .jsonl .parquet.

  megalite evaluate MODEL --data FILE|PREFIX [--mesh.tp 2] ...
      Scores of its task, perplexity and bits a byte, on one device or any mesh; as JSON and Markdown.

  megalite embed MODEL --data FILE --output FILE.npy|.parquet [--query TEXT]
      Vectors of texts, and which are alike.

  megalite generate MODEL --prompt TEXT [--temperature 0.8] [--top-p 0.95] ...
      Text from a GPT, as it comes; of a BERT, the words it puts where a mask is.

  megalite chat MODEL
      A conversation, by the tokenizer's chat template.

  megalite verify RECIPE|FILE.yaml [--mesh.tp 2] [--deepspeed ds_configs/zero3.json] ...
      Run a shrunk model in this layout on CPU ranks, beside one process: are the numbers the same?

  megalite tune RECIPE|FILE.yaml --cluster 8x8xH100 [--write ds_configs/tuned.json] [--explain 1] [--dry-run] ...
      Which layout fits and is fastest there? Predicted, without a GPU.

  megalite bench RECIPE|FILE.yaml [--steps 30] | --sweep FILE.yaml | compare A.json B.json | network | kernels
      Tokens a second, FLOP/s, memory, and where the time goes; measured.

  megalite import NAME|FOLDER --output RUN_FOLDER
      A Hugging Face GPT-2, Llama, Mistral, Qwen2 or BERT as step 0 of a run.

  megalite export CHECKPOINT --output FOLDER [--dtype bf16]
      A checkpoint as a Hugging Face model.

  megalite checkpoint ls|verify|show RUN_FOLDER|CHECKPOINT ...
      What checkpoints there are; is every byte what was written; what does one hold.

  megalite submit RECIPE|FILE.yaml [--nodes 8] [--slurm.time 24:00:00] [--slurm.profile mine.yaml] [--print] ...
  megalite submit --sweep FILE.yaml | --chain FILE.yaml
      Train on a SLURM cluster: a run, a sweep of runs, or jobs one after the other.

  megalite jobs [RUN_FOLDER ...]
      How they are: state, step, loss, tokens a second, time left, why one waits or died.

`megalite VERB --help` explains every flag."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    gc.set_threshold(100_000)  # a start makes a million objects and no garbage; to look for it among them took 13 % of the processor's time
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            say(HELP)
        elif arguments[0] in VERBS:
            VERBS[arguments[0]](arguments[1:])
        elif arguments[0] == "cluster":  # what batch scripts ask; nobody types it
            verbs.cluster(arguments[1:])
        else:
            raise UserError(f"megalite has no verb {arguments[0]!r}{near(arguments[0], list(VERBS))}; the verbs are {', '.join(VERBS)}")
    except UserError as error:
        say(f"megalite: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "report"):  # a rank's failure carries its own traceback; anything else is our bug and shows all
            raise
        say(f"megalite: {error}", file=sys.stderr)
        sys.exit(1)
