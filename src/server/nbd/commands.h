#pragma once
// What the commands do to a disk, except for writes, whose data is the connection's business.

#include "server/nbd/replies.h"
#include "server/nbd/session.h"
#include "server/pace.h"

namespace qcow::nbd {

/// The part of a disk that is known to be data, so that the next large read need not ask. Stale knowledge does no harm:
/// zeros are then sent as data.
struct KnownData {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
};

/// Performs a request that refuse() has let through, and replies. `payload`: what came with it. Any number of threads.
/// How long the disk took is put down in `pace`.
void perform(const Session& session, const Request& request, std::span<const std::byte> payload, KnownData& known,
             Pace& pace, Replies& replies);

/// Replies that a change of the disk is done, or why it is not; makes it durable before, if it is to be.
void finish_change(const Session& session, const Request& request, Result<void> result, Replies& replies);

/// How much of the bytes from `at` on is done in one piece: pieces end where blocks do.
std::size_t next_piece(std::uint64_t at, std::uint64_t length, std::size_t chunk);

}  // namespace qcow::nbd
