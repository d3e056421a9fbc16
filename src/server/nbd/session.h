#pragma once
// What client and server agreed on in the handshake.

#include <cstdint>
#include <vector>

#include "qcow/serve.h"
#include "server/nbd/protocol.h"

namespace qcow::nbd {

struct Session {
    const NbdExport* exported = nullptr;
    Style style = Style::simple;
    std::vector<const NbdContext*> contexts;  ///< that the client asks about; their ids are their places here
};

/// Bytes of data in one piece: the disk's blocks are not cut.
std::size_t chunk_bytes(const Disk& disk);

/// "base:allocation" and, where it is offered, "qemu:allocation-depth".
std::vector<NbdContext> built_in_contexts(const NbdExport& exported);

}  // namespace qcow::nbd
