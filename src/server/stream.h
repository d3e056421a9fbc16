#pragma once
// The two directions of a connection, whatever carries them.

#include <cstddef>
#include <span>

namespace qcow {

/// A connection that carries bytes in both directions.
///
/// Thread safety: one thread receives and one sends at a time. Any thread may call shutdown.
class Stream {
public:
    Stream() = default;
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    virtual ~Stream() = default;

    /// Waits for bytes and takes what there is: at least one, at most to.size(). 0: there will be no more.
    virtual std::size_t receive(std::span<std::byte> to) = 0;

    /// Sends everything. Returns false if the peer is gone.
    virtual bool send(std::span<const std::byte> bytes) = 0;

    /// From now on the peer may be silent for as long as it likes. Before, it has a limited time to get here.
    virtual void wait_forever() = 0;

    /// Both directions end, also for those who are waiting.
    virtual void shutdown() = 0;
};

}  // namespace qcow
