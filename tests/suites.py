"""Suites that others wrote, over a scripted engine: `make suites`.

llama.cpp's tests of its server come with llama-cpp-python's source distribution; schemathesis makes
requests from our own `/openapi.json`, and from what OpenAI and Anthropic publish, and holds the
answers against it. What is not run is named here, with the reason.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import specifications

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "suites"
PORT = 18080
KEY = "sk-this-is-the-secret-key"  # the one of llama.cpp's tests

LEFT_OUT = {
    # What their tiny model says.
    "test_compat_anthropic.py": (
        "test_anthropic_messages_basic",
        "test_anthropic_thinking_history_in_template",
        "test_anthropic_thinking_with_reasoning_model",
        "test_anthropic_vision_base64_with_multimodal_model",
        # Images are refused with 500 there, with 400 here; no messages are answered there.
        "test_anthropic_tool_result_with_image",
        "test_anthropic_vision_format_accepted",
        "test_anthropic_empty_messages",
    ),
    "test_compat_oai_responses.py": (
        "test_responses_with_openai_library",
        "test_responses_stream_with_llama_telemetry",  # progress of prompts, not told here
    ),
    "test_security.py": (
        # llama.cpp's own endpoints, its front end's files, its proxy and media folders.
        "test_correct_api_key",
        "test_access_static_assets_without_api_key",
        "test_cors_proxy",
        "test_local_media_file",
        # They look for headers in capitals, and for origins by default.
        "test_cors_options",
        "test_cors_origins_localhost_reflects",
        "test_cors_origins_defaults_to_localhost_with_tools_enabled",
    ),
}


@contextmanager
def served(*key: str) -> Iterator[None]:
    command = [sys.executable, str(HERE / "service.py"), str(PORT), *key]
    with subprocess.Popen(command) as process:
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health").close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            yield
        finally:
            process.kill()


def llama_tests() -> Path:
    """The folder of llama.cpp's tests, without what downloads their models."""
    folder = BUILD / "llama"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    release = importlib.metadata.version("llama-cpp-python")
    wanted = [f"llama-cpp-python=={release}", "--no-deps", "--no-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-q", *wanted, "-d", str(BUILD)]
    if not list(BUILD.glob("*.tar.gz")):
        subprocess.run([*command, "--no-build-isolation"], check=True)
    (archive,) = BUILD.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, found, name = member.name.partition("/vendor/llama.cpp/tools/server/tests/")
            if found and member.isfile() and (name.startswith("unit/") or name == "utils.py"):
                member.name = name
                tar.extract(member, folder, filter="data")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    return folder


def run_llama_tests(folder: Path, *names: str) -> int:
    left_out = [name for file in names for name in LEFT_OUT[file]]
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", ".", "-p", "no:cacheprovider"]
    command += ["-k", " and ".join(f"not {name}" for name in left_out)]
    env = os.environ | {"DEBUG_EXTERNAL": "1", "PORT": str(PORT)}
    files = [f"unit/{name}" for name in names]
    return subprocess.run([*command, *files], cwd=folder, env=env).returncode


def run_schemathesis(document: str, base: str, *options: str) -> int:
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", document]
    command += ["-u", f"http://127.0.0.1:{PORT}{base}", "--continue-on-failure", *options]
    return subprocess.run(command, cwd=BUILD).returncode  # where it may leave things


def run_our_document() -> int:
    # 501 is the answer of what no model here has.
    left_out = ("--exclude-path", "/v1/embeddings")
    document = f"http://127.0.0.1:{PORT}/openapi.json"
    checks = ("--checks", "not_a_server_error", "--max-examples", "30")
    return run_schemathesis(document, "", *checks, *left_out)


def run_public_documents() -> Iterator[int]:
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance"
    # Trying each bound of their hundreds of fields would take an hour.
    options = ("--phases", "examples,fuzzing", "--max-examples", "20", "--checks", checks)
    options += ("--suppress-health-check", "all")
    for vendor in specifications.SERVED:
        file = BUILD / f"{vendor}.json"
        base = specifications.write(vendor, file)
        headers = ("-H", "anthropic-version: 2023-06-01") if vendor == "anthropic" else ()
        yield run_schemathesis(str(file), base, *options, *headers)


def main() -> int:
    folder = llama_tests()
    with served():
        codes = [
            run_llama_tests(folder, "test_compat_anthropic.py", "test_compat_oai_responses.py"),
            run_our_document(),
            *run_public_documents(),
        ]
    with served(KEY):
        codes.append(run_llama_tests(folder, "test_security.py"))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
