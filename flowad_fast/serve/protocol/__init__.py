"""The Open Inference Protocol (version 2) over HTTP and gRPC, in front of a `Pool`.

settings.py    where, to whom, how much; the token
refusals.py    what a client is told that gets no answer
tensors.py     values of tensors, from JSON, binary, or fields of messages
describing.py  metadata and configuration of models
asking.py      a request of the protocol to what a pool is asked, and the answer back
desk.py        what HTTP and gRPC have in common: limits, models, readiness
over_http.py   `application(pool, settings)`: HTTP alone, for a server of your own
over_grpc.py   the service of gRPC
front.py       `serve(pool, settings)`: both at their addresses, until SIGTERM
"""
