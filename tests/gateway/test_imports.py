"""The routes answer a chat without torch or transformers in the process."""

import subprocess
import sys
from pathlib import Path

from tests.gateway.tokenizer_files import write_folder

PROGRAM = """
import asyncio, pathlib, sys
from tests.gateway.fake_engine import FakeEngine
from tests.gateway.harness import asgi_client, make_app, make_gateway

async def main():
    app = make_app(make_gateway(FakeEngine(), pathlib.Path(sys.argv[1])))
    async with asgi_client(app) as client:
        body = {"model": "llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200

asyncio.run(main())
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""


def test_a_chat_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
