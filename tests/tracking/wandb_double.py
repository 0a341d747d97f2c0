"""A test double of a Weights & Biases server, written from scratch.

It implements the requests that the client makes to log a run online: the owner of the key, the state of a run, and the
stream of its files, whose lines are stored by offset. If `revoked` is set, it rejects the key. Not implemented:
artifacts, files, sweeps, web pages.
"""

import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY = "wandb-history.jsonl"


class WandbDouble:
    """The double, used by `with WandbDouble() as server` and WANDB_BASE_URL=server.address."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
        """The lines by offset, for each run and file."""
        self.runs: dict[str, dict[str, Any]] = {}
        """The properties of each run by its id."""
        self.asked: list[str] = []
        """The operations and paths of all requests, in order."""
        self.revoked = False
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"double": self}))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "WandbDouble":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def history(self, run: str) -> list[dict[str, Any]]:
        """The rows logged to a run, in order."""
        return [json.loads(line) for _, line in sorted(self.lines[run][HISTORY].items())]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The response to a GraphQL operation."""
        match operation:
            case "Viewer":
                teams = {"edges": [{"node": {"name": "alice"}}]}
                return {"viewer": {"id": "1", "entity": "alice", "username": "alice", "flags": "{}", "teams": teams}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "RunResumeStatus":
                return {
                    "model": {
                        "id": "1",
                        "name": "p",
                        "entity": {"id": "1", "name": "alice"},
                        "bucket": self._bucket(variables["name"]),
                    }
                }
            case "UpsertBucket":
                name = variables.get("name") or ""
                inserted = name not in self.runs
                known = self.runs.setdefault(name, {})
                known |= {key: value for key, value in variables.items() if value is not None}
                project = {"id": "1", "name": "ratchet", "entity": {"id": "1", "name": "alice"}}
                bucket = {"id": name, "name": name, "displayName": known.get("displayName"), "project": project}
                bucket |= {"config": known.get("config"), "historyLineCount": len(self.lines[name][HISTORY])}
                return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in variables["files"]]
                return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
            case _:
                return {}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        files = self.lines[name]
        rows = [line for _, line in sorted(files[HISTORY].items())]
        summary = files["wandb-summary.json"]
        return {
            "id": name,
            "name": name,
            "displayName": self.runs[name].get("displayName"),
            "summaryMetrics": summary.get(0, "{}"),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(rows),
            "historyTail": json.dumps(rows[-1:]),
            "eventsTail": "[]",
            "config": self.runs[name].get("config") or "{}",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),  # tells the client that the run has started
        }


class _Handler(BaseHTTPRequestHandler):
    double: WandbDouble

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(content) if "json" in self.headers.get("Content-Type", "") else {}
        double = self.double
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
        with double.lock:
            double.asked.append(self.path if operation is None else operation[1])
            if double.revoked:
                self._send(401, {"errors": [{"message": "the key was revoked"}]})
            elif stream:
                for name, chunk in (body.get("files") or {}).items():
                    for place, line in enumerate(chunk["content"], chunk["offset"]):
                        double.lines[stream[1]][name][place] = line
                self._send(200, {})
            elif operation:
                self._send(200, {"data": double.answer(operation[1], body.get("variables") or {})})
            else:
                self._send(404, {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send(200, {})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print no log."""
