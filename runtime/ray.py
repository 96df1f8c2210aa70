"""Batches on a Ray cluster: an actor class for Ray Data, and a batch file over many nodes.

Each node has an engine of its own, with the model's file in reach of it. Ray Data hands out rows
and remembers which are done (its checkpoint, by ``custom_id``); what a row asks and what is
answered is the same as in a batch file on one machine. Importing this raises UserError without Ray.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from .api.refusal import Refusal, refusal_of
from .api.texts import EngineTexts
from .batch.answers import Answerer, Ready, Rest, bad, refused
from .batch.lines import Asked, BadLine, extent, lines, parse
from .engine.engine import Engine as LocalEngine
from .errors import UserError, option, reason
from .sizes import parse_size

try:
    import numpy as np
    import pyarrow as pa
    import ray
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.datasource import BlockBasedFileDatasink, Datasource, ReadTask
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as missing:
    raise UserError(
        f"a Ray cluster needs more packages ({missing}): pip install 'moe-gguf[ray]'"
    ) from missing

_BLOCK_ROWS = 64
_OVERLAP = 2  # batches in an engine at a time, so that none waits for the last row of another
_ANSWER = ("response", "error")
# Where a row has no body of OpenAI's, these are one.
_BARE = {"prompt": "/v1/completions", "messages": "/v1/chat/completions"}


class Engine:
    """For ``map_batches``: one engine in each actor, which answers the rows it is given.

    A row asks with ``url`` and ``body`` as a batch line does, or only with a ``prompt`` or with
    ``messages``, beside which ``body`` given here has the other fields; a body may be JSON text. It
    comes back with all its columns and, in whatever order rows are done, ``text``, the first
    answer's text; ``response``, as JSON text in a batch line's form; and ``error``, the same if
    there was none, also of a row that already has one. No row ends the job.

    ``options`` are ``moe_gguf.Engine``'s. Give as ``compute`` an ``ActorPoolStrategy`` of the size
    of the cluster with ``max_concurrent_calls_per_actor=2``, so that batches overlap, and as
    ``memory`` as many bytes as an engine may use.
    """

    def __init__(
        self, model: str, *, body: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self._engine = LocalEngine(model, **options)
        self._body = dict(body or {})
        name = self._engine.found.layout.name
        self._answerer = Answerer(self._engine, EngineTexts(self._engine), name)

    async def __call__(self, batch: Any) -> AsyncIterator[pa.Table]:
        for done in asyncio.as_completed([self._answered(row) for row in _rows(batch)]):
            yield _table([await done])

    async def _answered(self, row: dict[str, Any]) -> dict[str, Any]:
        rest, text = {"response": None, "error": row.get("error")}, None
        if rest["error"] is None:
            try:
                answered, text = await self._answer(row)
            except BadLine as error:
                answered = bad(error)
            except Exception as error:  # any: an error is a row
                answered = refused(refusal_of(error))
            rest = {
                key: None if value is None else json.dumps(value) for key, value in answered.items()
            }
        return {**row, "text": text, **rest}

    async def _answer(self, row: Mapping[str, Any]) -> tuple[Rest, str]:
        ready: Ready = self._answerer.understand(_asked(row, self._body))
        results = await asyncio.gather(*map(self._answerer.compute, ready.call.requests))
        return self._answerer.answer(ready, list(results)), results[0].text


def _asked(row: Mapping[str, Any], more: Mapping[str, Any]) -> Asked:
    custom_id = str(row.get("custom_id"))
    body = row.get("body")
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"body is not JSON: {error}", "body") from None
    if isinstance(body, Mapping):
        return Asked(custom_id, str(row.get("url")), {**more, **body})
    for name, url in _BARE.items():
        if row.get(name) is not None:
            return Asked(custom_id, url, {**more, name: row[name]})
    raise Refusal("a row needs a body, a prompt or messages", "body")


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch in any of Ray Data's formats, as Python's own values."""
    if isinstance(batch, pa.Table):
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    columns = {name: list(batch[name]) for name in batch}
    n = len(next(iter(columns.values()), []))
    return [{name: _plain(column[i]) for name, column in columns.items()} for i in range(n)]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """A block whose answers are text even where all are null: blocks must agree in their types."""
    table = pa.Table.from_pylist(rows)
    for name in ("text", *_ANSWER):
        column = table.column(name).cast(pa.string())
        table = table.set_column(table.column_names.index(name), name, column)
    return table


# --- batch files ----------------------------------------------------------------------------------

_LINE = pa.schema(
    [
        # Unique, as a checkpoint wants it: the id of the line, where it has none of its own.
        *(("custom_id", pa.string()), ("id", pa.string()), ("named", pa.string())),
        *(("url", pa.string()), ("body", pa.string()), ("error", pa.string())),
    ]
)


class Lines(Datasource):
    """The lines of a batch file as rows; one that is no request has an ``error`` already."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self._source = source

    def get_name(self) -> str:
        return "Lines"

    def estimate_inmemory_data_size(self) -> int:
        return self._source.stat().st_size

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        metadata = BlockMetadata(
            num_rows=None,
            size_bytes=self.estimate_inmemory_data_size(),
            input_files=[str(self._source)],
            exec_stats=None,
        )
        source = self._source
        return [ReadTask(lambda: _blocks(source), metadata, schema=_LINE)]


def _blocks(source: Path) -> Iterator[pa.Table]:
    rows: list[dict[str, Any]] = []
    for row in _lines(source):
        rows.append(row)
        if len(rows) == _BLOCK_ROWS:
            yield pa.Table.from_pylist(rows, _LINE)
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, _LINE)


def _lines(source: Path) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    for line in lines(source):
        row = dict.fromkeys(_LINE.names) | {"id": line.id, "custom_id": line.id}
        try:
            asked = parse(line)
            named = asked.custom_id.encode(errors="surrogatepass")
            digest = xxhash.xxh3_64_intdigest(named)
            if digest in seen:
                raise BadLine(
                    "duplicate_custom_id", "an earlier line has this custom_id", asked.custom_id
                )
            seen.add(digest)
            row |= {"url": asked.url, "body": json.dumps(asked.body), "custom_id": asked.custom_id}
            row["named"] = json.dumps(asked.custom_id)
        except BadLine as error:
            row |= {"error": json.dumps(bad(error)["error"]), "named": json.dumps(error.custom_id)}
        yield row


class Answers(BlockBasedFileDatasink):
    """Answered rows as the lines of files in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), file_format="jsonl")

    def write_block_to_file(self, block: Any, file: Any) -> None:
        for row in block.iter_rows(public_row_format=False):
            parts = {"id": json.dumps(row["id"]), "custom_id": row["named"]}
            parts |= {name: row[name] or "null" for name in _ANSWER}
            text = ", ".join(f'"{name}": {value}' for name, value in parts.items())
            file.write(f"{{{text}}}\n".encode())


def run(
    address: str,
    model: Path,
    source: Path,
    folder: Path,
    options: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Answer ``source`` into files in ``folder``, with an engine on each node of a cluster.

    Both, and the model, must be on a file system that all nodes share. What is answered is
    remembered in the folder's ``checkpoint``: the same call goes on.
    """
    extent(source)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the folder {folder} ({reason(error)})") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise UserError(
                f"there is no Ray cluster at {address} ({error}): give another {option('ray')}"
            ) from None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    memory = options.get("memory", "auto")
    # What keeps each engine on a node of its own; Ray counts this memory as the engine's.
    share = 1 if memory == "auto" else parse_size(str(memory))
    group = placement_group([{"memory": share}] * len(nodes), strategy="STRICT_SPREAD")
    if not group.wait(timeout_seconds=60):
        remove_placement_group(group)
        raise UserError(
            f"not every one of the {len(nodes)} nodes has {memory} for an engine: give less "
            f"{option('memory')}"
        )
    say(f"an engine on each of {len(nodes)} nodes")
    try:
        _answer_all(model, source, folder, options, share, group)
    finally:
        remove_placement_group(group)


def _answer_all(
    model: Path, source: Path, folder: Path, options: Mapping[str, Any], share: int, group: Any
) -> None:
    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        id_column="custom_id",
        checkpoint_path=str(folder.absolute() / "checkpoint"),
        delete_checkpoint_on_success=False,
    )
    try:
        rows = ray.data.read_datasource(Lines(source.absolute()))
        answered = rows.map_batches(
            Engine,
            fn_constructor_args=(str(model.absolute()),),
            fn_constructor_kwargs=dict(options),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=group.bundle_count, max_concurrent_calls_per_actor=_OVERLAP
            ),
            num_cpus=0,
            memory=share,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        answered.write_datasink(Answers(folder.absolute()))
    finally:
        context.checkpoint_config = before
