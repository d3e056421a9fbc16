#pragma once
// One client, from its first byte to its last.

#include <span>

#include "qcow/serve.h"
#include "server/nbd/tls.h"
#include "server/stream.h"

namespace qcow::nbd {

/// Serves a client until it leaves, breaks the protocol, or the stream is shut down. Requests that have been received
/// are completed. The exports have their built-in contexts among their contexts. `tls`: what clients must use; nullptr:
/// there is none.
void serve_client(Stream& stream, std::span<const NbdExport> exports, const NbdLimits& limits,
                  const Tls* tls = nullptr);

}  // namespace qcow::nbd
