"""A Node Runtime control plane for the tests, with grpcio and the Python library. It shares no code with the node.

Arguments: the folder of lease.proto, the ports of REST and gRPC (0: a free one), and perhaps a folder with PEM files. With
it, both ports use TLS and require a client certificate. The first line on stdout is JSON with both ports of 127.0.0.1.
The test controls it with requests below /test/:

  POST /test/leases  a JSON list of leases, in the JSON form of protobuf. The next stream sends them.
  POST /test/mode    JSON with new values of MODE.
  POST /test/forget  forgets all nodes, and ends their streams without an error.
  POST /test/end     JSON with the name of a gRPC status, which ends all streams.
  POST /test/goaway  replaces the gRPC server. Its connections get a GOAWAY, its streams end.
  GET  /test/calls?kind=K&run=R&count=N   waits for N such calls, and answers with all of them.

It ends when its stdin ends.
"""

import concurrent.futures
import json
import os
import ssl
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
from google.protobuf import json_format

sys.path.insert(0, sys.argv[1])
lease_pb2, lease_pb2_grpc = grpc.protos_and_services("lease.proto")

WAIT_SECS = 60
MODE = {
    # What a report gets: "accept", "refuse" (success = false), "hold" (accepted, but not answered), or the name of a
    # gRPC status.
    "reports": "accept",
    # What a registration gets: "create", or "page" (an HTML page with status 200).
    "register": "create",
    # Like the original with its database: a second registration gets a 500, a heartbeat of an unknown node a 404, and
    # its stream ends without an error.
    "origin": False,
    # Whether streams send no lease.
    "mute": False,
}
changed = threading.Condition()
calls = []
leases = []
nodes = set()
# Raised to end all streams, with this status.
streams = {"number": 0, "status": None}
# The first report of each run. A control plane counts no other.
accepted = {}


def note(kind, **more):
    with changed:
        calls.append({"kind": kind, **more})
        changed.notify_all()


class Leases(lease_pb2_grpc.LeaseServiceServicer):
    def Pull(self, request, context):
        note("pull", node=request.node_id, max_leases=request.max_leases)
        if MODE["origin"] and request.node_id not in nodes:
            return
        ended = threading.Event()
        number = streams["number"]

        def end():
            ended.set()
            with changed:
                changed.notify_all()

        context.add_callback(end)
        over = lambda: ended.is_set() or number != streams["number"]
        while True:
            with changed:
                changed.wait_for(lambda: over() or (leases and not MODE["mute"]))
                if over():
                    break
                lease = leases.pop(0)
            yield lease
        note("pull-ended")
        if not ended.is_set() and streams["status"]:
            context.abort(grpc.StatusCode[streams["status"]], "as the test wants")

    def Ack(self, request, context):
        note("ack", lease=request.lease_id, node=request.node_id)
        return lease_pb2.AckResponse(success=True)

    def Complete(self, request, context):
        return self.report("complete", request, context, lease_pb2.CompleteResponse)

    def Fail(self, request, context):
        return self.report("fail", request, context, lease_pb2.FailResponse)

    def report(self, kind, request, context, response):
        answer = MODE["reports"]
        fields = json_format.MessageToDict(
            request, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        with changed:
            first = answer in ("accept", "hold") and accepted.setdefault(request.run_id, fields) is fields
        note(kind, run=request.run_id, accepted=first, report=fields)
        if answer == "hold":
            with changed:
                changed.wait_for(lambda: MODE["reports"] != "hold")
        if answer in ("accept", "hold"):
            return response(success=True)
        if answer == "refuse":
            return response(success=False, message="the database is away")
        context.abort(grpc.StatusCode[answer], "as the test wants")


class Rest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=None, kind="application/json"):
        content = b"" if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if url.path != "/test/calls":
            return self.answer(404)
        wanted = dict(urllib.parse.parse_qsl(url.query))
        count = int(wanted.pop("count", 1))

        def found():
            fits = lambda call: all(str(call.get(key)) == value for key, value in wanted.items())
            return [call for call in calls if fits(call)]

        with changed:
            enough = changed.wait_for(lambda: len(found()) >= count, WAIT_SECS)
            self.answer(200 if enough else 504, found() if enough else calls[-50:])

    def do_POST(self):
        body = self.body()
        path = urllib.parse.urlsplit(self.path).path
        if path == "/v1/nodes:register":
            if MODE["register"] == "page":
                return self.answer(200, "<!doctype html><title>Sign in</title>", "text/html")
            again = MODE["origin"] and body["nodeId"] in nodes
            nodes.add(body["nodeId"])
            note("register", body=body, again=again)
            return self.answer(500) if again else self.answer(201, {"nodeId": body["nodeId"]})
        if path.startswith("/v1/nodes/") and path.endswith(":heartbeat"):
            note("heartbeat", node=path, body=body)
            node = urllib.parse.unquote(path.removeprefix("/v1/nodes/").removesuffix(":heartbeat"))
            return self.answer(404 if MODE["origin"] and node not in nodes else 200, {})
        if path == "/test/leases":
            with changed:
                leases.extend(json_format.ParseDict(lease, lease_pb2.Lease()) for lease in body)
                changed.notify_all()
            return self.answer(204)
        if path == "/test/mode":
            with changed:
                MODE.update(body)
                changed.notify_all()
            return self.answer(204)
        if path in ("/test/forget", "/test/end"):
            with changed:
                if path == "/test/forget":
                    nodes.clear()
                streams.update(number=streams["number"] + 1, status=body)
                changed.notify_all()
            return self.answer(204)
        if path == "/test/goaway":
            global server
            server.stop(grace=None).wait()
            server = grpc_server(grpc_port)[0]
            return self.answer(204)
        self.answer(404)

    def do_DELETE(self):
        note("remove", node=self.path)
        self.answer(204)


def grpc_server(port):
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=16)
    made = grpc.server(pool, options=[("grpc.so_reuseport", 1)])
    lease_pb2_grpc.add_LeaseServiceServicer_to_server(Leases(), made)
    address = f"127.0.0.1:{port}"
    if pem is None:
        port = made.add_insecure_port(address)
    else:
        key, chain, clients = ((pem / name).read_bytes() for name in ("server.key", "server.pem", "client-ca.pem"))
        credentials = grpc.ssl_server_credentials([(key, chain)], clients, require_client_auth=True)
        port = made.add_secure_port(address, credentials)
    made.start()
    return made, port


pem = Path(sys.argv[4]) if len(sys.argv) > 4 else None
server, grpc_port = grpc_server(int(sys.argv[3]))
rest = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Rest)
if pem is not None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pem / "client-ca.pem")
    tls.load_cert_chain(pem / "server.pem", pem / "server.key")
    tls.verify_mode = ssl.CERT_REQUIRED
    rest.socket = tls.wrap_socket(rest.socket, server_side=True)
threading.Thread(target=rest.serve_forever, daemon=True).start()
print(json.dumps({"rest": rest.server_port, "grpc": grpc_port}), flush=True)
sys.stdin.read()
os._exit(0)
