"""Serve a model with the chat page: `python -m scripts.chat_web`, then open http://127.0.0.1:8000."""

import argparse
import contextlib
import dataclasses
import re
import socket
from urllib.parse import urlsplit

SMALL_MODEL = 50_000_000  # parameters; below, one step is too little work to share between CPU threads
LOOPBACK = ("127.0.0.1", "::1")
ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?")  # as browsers send it
KEY = re.compile(r"[!-~]+")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve a model with the chat page.")
    parser.add_argument("-n", "--num-gpus", type=int, default=1, help="replicas of the model, one a GPU")
    parser.add_argument("-i", "--source", choices=["base", "sft", "rl"], default="sft", help="which stage's model")
    parser.add_argument("-g", "--model-tag", default=None, help="default: the largest d<N>")
    parser.add_argument("-s", "--step", type=int, default=None, help="default: the newest")
    parser.add_argument("-t", "--temperature", type=float, default=0.8, help="where a request does not say (0 to 2)")
    parser.add_argument("-k", "--top-k", type=int, default=50, help="where a request does not say (0 to 200; 0: all)")
    parser.add_argument("-m", "--max-tokens", type=int, default=512, help="of an answer, where a request does not say")
    parser.add_argument("-p", "--port", type=int, default=8000, help="0 takes any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in: set a key then")
    parser.add_argument("--api-key", default=None, help="asked of whoever chats (default: NANOCHAT_API_KEY, or none)")
    parser.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="lets pages of this site ask")
    parser.add_argument("--max-requests", type=int, default=128, help="under way or waiting on a GPU; more get a 429")
    parser.add_argument("--log-conversations", action="store_true", help="into conversations.jsonl of the base folder")
    parser.add_argument("--compile", type=int, default=0, choices=[0, 1], help="faster on GPUs, after a minute or more")
    parser.add_argument("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    for name, low, high in (
        ("num-gpus", 1, 64),
        ("temperature", 0, 2),
        ("top-k", 0, 200),
        ("max-tokens", 1, 4096),
        ("port", 0, 65535),
        ("max-requests", 1, 100_000),
    ):
        value = getattr(args, name.replace("-", "_"))
        if not low <= value <= high:
            parser.error(f"--{name} is {value}, expected {low} to {high}")
    for origin in args.cors:
        if not ORIGIN.fullmatch(origin):
            parser.error(f"--cors is {origin}, expected an origin such as https://example.com or http://localhost:3000")
    if args.api_key is not None and not KEY.fullmatch(args.api_key):
        parser.error("--api-key: expected letters, digits and signs that a header can carry, without spaces")
    return args


def listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded, so that one in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SystemExit(f"cannot listen on {host}:{port} ({error.strerror}): try another --port or --host") from error


def replica_devices(device, count: int) -> list:
    """The devices of `count` replicas, of which the first is on `device`."""
    import torch

    if count == 1:
        return [device]
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > there:
        raise SystemExit(f"--num-gpus {count} needs {count} CUDA devices, this run has {there} ({device.type})")
    return [torch.device("cuda", index) for index in range(count)]


def load_workers(args: argparse.Namespace, run) -> tuple[list, object, dict]:
    """A replica of the model for each GPU: (workers, tokenizer, the checkpoint's metadata)."""
    from nanochat import decoding
    from nanochat.checkpoint import load_model
    from nanochat.compilation import will_compile
    from nanochat.engine import Engine, Request
    from nanochat.engine_worker import EngineWorker

    workers = []
    for gpu, device in enumerate(replica_devices(run.device, args.num_gpus)):
        replica = dataclasses.replace(run, device=device)
        model, tokenizer, meta = load_model(args.source, replica, args.model_tag, args.step)
        static = decoding.available(replica)
        compiles = static and bool(args.compile) and will_compile(1, replica)
        engine = Engine(model, tokenizer, static=static, compiles=compiles)
        del model  # the engine's copy is smaller on GPUs
        workers.append(EngineWorker(engine, gpu, args.max_requests, first=Request([tokenizer.bos], max_tokens=2)))
    return workers, tokenizer, meta


def main(args: argparse.Namespace) -> None:
    # Here, so that --help and wrong flags do not wait for torch.
    import torch
    import uvicorn

    from nanochat import api, guard, paths, runtime
    from nanochat.checkpoint import CheckpointError
    from nanochat.server import SHUTDOWN_SECONDS, ChatServer, ConversationLog, create_app
    from nanochat.tokenizer import TokenizerError

    with contextlib.closing(listen(args.host, args.port)) as listener:
        run = runtime.start(args.device_type)
        try:
            workers, tokenizer, meta = load_workers(args, run)
        except (CheckpointError, TokenizerError) as error:
            raise SystemExit(str(error)) from error
        engine = workers[0].engine
        if run.device.type == "cpu" and sum(p.numel() for p in engine.model.parameters()) < SMALL_MODEL:
            torch.set_num_threads(1)  # leaves the other cores to the event loop and to other programs
        host, port = listener.getsockname()[:2]
        local = host in LOOPBACK
        api_key = args.api_key or runtime.api_key()
        if api_key and not KEY.fullmatch(api_key):
            raise SystemExit(
                "NANOCHAT_API_KEY: expected letters, digits and signs that a header can carry, without spaces"
            )
        log = ConversationLog(paths.conversations_file()) if args.log_conversations else None
        model_name = f"{meta['tag']} · {meta['stage']} · step {meta['step']}"
        app = create_app(
            workers,
            tokenizer,
            engine.max_length,
            defaults=api.Settings(args.temperature, args.top_k, args.max_tokens),
            model_name=model_name,
            model_id=f"{meta['tag']}-{meta['stage']}",
            api_key=api_key,
            cors=args.cors,
            host_names=(*guard.LOCAL_NAMES, *(urlsplit(origin).hostname for origin in args.cors)) if local else None,
            log=log,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"nanochat {model_name} on {run.device}" + (f", {len(workers)} replicas" if len(workers) > 1 else ""))
        if not local and not api_key:
            print("Anyone who can reach this machine can chat with it: --api-key KEY asks for a key.")
        if log:
            print(f"What is said is written to {log.path}")
        print(f"Open {address}  (Ctrl-C ends it; for clients of OpenAI's API: {address}/v1)", flush=True)
        config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        server = ChatServer(config, app, workers)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down when it lets this one through
            server.run(sockets=[listener])
        runtime.close(run)
        if server.failed_at is not None:
            raise SystemExit("the model stopped working, see above")


if __name__ == "__main__":
    main(parse_args())
