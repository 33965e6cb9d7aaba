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

Who asks on a bridge and has an address of its network hears of the names of all networks that it is on; nobody else hears
anything. A name of one label that nobody has does not exist, whatever the host's resolvers may think, but for questions
about top level domains; nor does a name below a subnet of ours that nobody has. Everything else goes to the instance's own
resolvers, or the host's, as it came: EDNS included, over the same transport. Who is on internal networks alone is refused.

Killed at any moment, it costs requests in flight: the engine's client starts it again and tells it everything again. Without
an engine it serves on; with neither an engine nor anything to serve it ends after ten seconds.
"""
