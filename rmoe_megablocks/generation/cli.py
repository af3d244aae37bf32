"""The command ``rmoe generate``."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from rmoe_megablocks.errors import UsageError
from rmoe_megablocks.evaluation.cli import add_trust, at_least_one, need

_SAMPLING = ("temperature", "top_p", "top_k", "seed")
_NEW_TOKENS = 128


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Add the command to the subparsers of ``rmoe``; :func:`run` runs what they parse."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a text with a Hugging Face folder",
        description="Continue a text. Without --temperature, --top-p, --top-k or --seed the likeliest token is taken "
        "each time (greedy); with one of them tokens are drawn, from what the others leave as it is.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="FOLDER", type=Path, help="a Hugging Face folder, of rmoe export or of any causal model")
    add("prompt", metavar="PROMPT", help="the text to continue; - reads it from standard input")
    add("--max-new-tokens", type=int, metavar="N", help=f"(default: {_NEW_TOKENS}, or what the model has room for)")
    add("--greedy", action="store_true", help="take the likeliest token each time")
    add("--temperature", type=float, metavar="T", help="divides the logits (default: 1)")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this probability (default: 1)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: from all)")
    add("--seed", type=int, help="of what is drawn (default: another one each time)")
    add("--show-routing", action="store_true", help="then the experts that each token took in each layer")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)")
    add("--device", help="as cpu or cuda:1 (default: a GPU if there is one)")
    add_trust(add)


def run(args: argparse.Namespace) -> int:
    """Run the command for parsed arguments; the exit code. Raises UsageError, one line."""
    _check(args)
    need("transformers")
    need("safetensors")
    prompt = sys.stdin.buffer.read().decode(errors="surrogateescape") if args.prompt == "-" else args.prompt
    if not prompt:
        raise UsageError("the prompt is empty: there is nothing to continue")
    try:
        return _generate(args, prompt)
    except KeyboardInterrupt:
        print(flush=True)
        return 130


def _check(args: argparse.Namespace) -> None:
    at_least_one(args, "max_new_tokens", "top_k")
    sampling = [f"--{name.replace('_', '-')}" for name in _SAMPLING if getattr(args, name) is not None]
    if args.greedy and sampling:
        raise UsageError(f"--greedy draws nothing: leave out {', '.join(sampling)}, or --greedy")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        raise UsageError(
            f"--temperature {args.temperature:g}: expected more than 0; --greedy takes the likeliest token"
        )
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p {args.top_p:g}: expected more than 0 and at most 1")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed}: expected 0 or more")


def _generate(args: argparse.Namespace, prompt: str) -> int:
    import torch

    from rmoe_megablocks.conversion.folder.checksums import check_checksums
    from rmoe_megablocks.evaluation import loading
    from rmoe_megablocks.evaluation.prediction import Processes
    from rmoe_megablocks.generation import routing

    loading.prepare(args.model, args.trust_router_code)
    check_checksums(args.model)
    device = Processes(args.device).device
    tokenizer = loading.tokenizer(args.model, args.trust_remote_code)
    ids_1S = torch.tensor([encode(tokenizer, prompt)], device=device)
    model = loading.model(args.model, getattr(torch, args.dtype), device, args.trust_remote_code)
    options = options_of(args, model, ids_1S.shape[1])
    if args.show_routing and not routing.routers(model):
        raise UsageError(f"--show-routing: {args.model} has no router of this package ({model.config.model_type})")
    if args.seed is not None:
        torch.manual_seed(args.seed)
    with torch.inference_mode():
        whole_1S = model.generate(ids_1S, streamer=_streamer(tokenizer), **options)
    if args.show_routing:
        tokens = [text_of(tokenizer, token) for token in whole_1S[0].tolist()]
        choices = routing.record(model, whole_1S)
        print("\n" + routing.table(choices, tokens, ids_1S.shape[1], shutil.get_terminal_size().columns))
    return 0


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt, with what the tokenizer puts in front of a text. Bytes that are no UTF-8 go to one of bytes."""
    from rmoe_megablocks.evaluation.texts import is_bytes

    if is_bytes(tokenizer):
        return list(prompt.encode(errors="surrogateescape"))
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not UTF-8: only a tokenizer of bytes reads that") from None
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise UsageError("the prompt has no token: there is nothing to continue")
    return ids


def text_of(tokenizer: Any, token: int) -> str | bytes:
    """A token as text; as a byte where it is one of a longer character."""
    from rmoe_megablocks.evaluation.texts import is_bytes

    return bytes([token]) if token in range(128, 256) and is_bytes(tokenizer) else tokenizer.decode([token])


def options_of(args: argparse.Namespace, model: Any, prompt: int) -> dict[str, Any]:
    """What generate() is called with for a prompt of so many tokens. Raises UsageError where there is no room."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if longest is None else longest - prompt
    if room is not None and room < (args.max_new_tokens or 1):
        left = f"--max-new-tokens {room} is the most" if room > 0 else "shorten it"
        raise UsageError(f"the prompt has {prompt} tokens, and the model has been made for {longest} in all: {left}")
    new = args.max_new_tokens or (_NEW_TOKENS if room is None else min(_NEW_TOKENS, room))
    options = {"max_new_tokens": new, "num_beams": 1, "do_sample": any(getattr(args, n) is not None for n in _SAMPLING)}
    if options["do_sample"]:  # all three, so that neither the library nor the folder decides
        options |= {"temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0, "top_k": args.top_k or 0}
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = 0  # one sequence is not padded; without it the library warns
    return options


def _streamer(tokenizer: Any):
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_special_tokens=True)
