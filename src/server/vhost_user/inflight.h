#pragma once
// The record of requests in flight, in memory that the front end keeps (vhost-user, "Inflight I/O tracking"): what a
// new server needs to go on where a killed one was.

#include <cstdint>
#include <span>
#include <vector>

#include "server/vhost_user/shared_memory.h"

namespace qcow::vhost_user {

/// The record of one split ring. Nothing in it is believed.
///
/// Thread safety: one thread at a time.
class InflightRecord {
public:
    /// Bytes of the record of a ring of `size` descriptors.
    static std::uint64_t bytes_for(std::uint16_t size);

    /// The record in `memory`, of which there are at least bytes_for(size), at a multiple of eight.
    InflightRecord(std::span<std::byte> memory, std::uint16_t size) : memory_(memory), size_(size) {}

    /// Returns the requests that were taken and not completed, in the order in which they were taken. `completed` is
    /// what the ring says of the number of completed requests.
    std::vector<std::uint16_t> recover(std::uint16_t completed);

    /// Notes that a request was taken.
    void begin(std::uint16_t head);

    /// Notes that a request will be completed, before the driver sees it. Then that the driver sees it.
    void will_complete(std::uint16_t head);
    void has_completed(std::uint16_t head, std::uint16_t completed);

private:
    struct Entry;
    struct Header;

    [[nodiscard]] Header& header() const;
    [[nodiscard]] Entry& entry(std::uint16_t head) const;

    std::span<std::byte> memory_;
    std::uint16_t size_;
    std::uint64_t counter_ = 0;
};

}  // namespace qcow::vhost_user
