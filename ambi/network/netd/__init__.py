"""netd: one process a run root that outlives the engine. It answers DNS on the gateways and holds published ports.

    RUN_ROOT/netd.sock      SEQPACKET, 0600; requests as in ambi/shim/PROTOCOL.md: `op`, `seq`, answered by `ok` or `error`

| op | fields | answer |
|---|---|---|
| `ping` | | `pid`, `version` |
| `network` | `id`, `names`: NetworkNames as a list, or null | `{}` |
| `publish` | `key`, `ports`: list of Port as lists | `ports`: as they are bound |
| `unpublish` | `key` | `{}` |
| `keep` | `networks`, `keys`: what there still is; all else is dropped | `{}` |
| `stop` | | `{}`, then it ends |

Killed at any moment, it costs requests in flight: the engine's client starts it again and tells it everything again. Without
an engine it serves on; with neither an engine nor anything to serve it ends after ten seconds.
"""
