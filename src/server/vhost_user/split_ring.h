#pragma once
// A split virtqueue as the device sees it (virtio 1.2, section 2.7): the ring through which the driver hands out
// requests, and takes them back.

// Its functions are not C++.
#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "server/vhost_user/guest_memory.h"

namespace qcow::vhost_user {

/// The buffers of a request, in the driver's order.
struct Chain {
    std::vector<std::span<const std::byte>> readable;  // by the device
    std::vector<std::span<std::byte>> writable;        // by the device; they come behind the readable ones
    std::vector<vring_desc> table;                     // a copy of the indirect one, where there is one
    std::uint64_t bytes = 0;                           // in all of them
};

/// Where the parts of a ring lie, in the front end's own addresses.
struct RingAddresses {
    std::uint64_t descriptors = 0;
    std::uint64_t used = 0;
    std::uint64_t available = 0;
    std::uint64_t log = 0;  // the guest's address of `used`
    bool logged = false;    // whether changes of `used` are recorded
};

/// A ring in the guest's memory, of which nothing is believed: each number is read once and verified.
///
/// Thread safety: one thread at a time takes requests (next, load, is_empty, and the functions for kicks), and one
/// thread at a time completes them (complete, wants_interrupt).
class SplitRing {
public:
    static constexpr std::uint16_t max_size = 1024;

    struct Setup {
        std::uint16_t size = 0;  // descriptors, a power of two
        RingAddresses addresses = {};
        std::uint16_t next_available = 0;  // the first request that is taken, as a free-running count
        bool event_index = false;          // VIRTIO_RING_F_EVENT_IDX
        bool indirect = false;             // VIRTIO_RING_F_INDIRECT_DESC
    };

    /// Finds the ring in the memory, which must outlive it. Errors: Errc::invalid_argument: a part of the ring is not
    /// in the memory, or not aligned.
    static Result<SplitRing> find(const GuestMemory& memory, const Setup& setup);

    // Taking requests.

    /// Returns the first descriptor of the next request; none: there is no request. Errors: Errc::corrupt: the ring
    /// makes no sense.
    [[nodiscard]] Result<std::optional<std::uint16_t>> next();

    /// Finds the buffers of the request that begins at descriptor `head`. Returns false if the chain makes no sense or
    /// its memory is not the guest's. `chain` then has the buffers in front of the mistake.
    [[nodiscard]] bool load(std::uint16_t head, Chain& chain) const;

    [[nodiscard]] bool is_empty() const;

    /// Asks the driver for a kick when it adds a request, or to spare it.
    void ask_for_kicks(bool wanted);

    /// The requests that were taken, as a free-running count.
    [[nodiscard]] std::uint16_t next_available() const { return next_available_; }
    /// Goes on from here instead.
    void go_on_from(std::uint16_t next_available) { next_available_ = next_available; }

    // Completing requests.

    /// Gives a request back, of which `written` bytes of its writable buffers were filled.
    void complete(std::uint16_t head, std::uint32_t written);

    /// The requests that were completed, as a free-running count.
    [[nodiscard]] std::uint16_t completed() const { return used_index_; }

    /// Whether the driver wants to be interrupted for what was completed since the last call.
    [[nodiscard]] bool wants_interrupt();

private:
    explicit SplitRing(const GuestMemory& memory, const Setup& setup) : memory_(&memory), setup_(setup) {}

    [[nodiscard]] std::uint16_t available_index() const;
    template <class At>
    bool follow(std::size_t index, std::size_t count, At at, Chain& chain, bool may_be_indirect) const;
    bool load_table(const vring_desc& descriptor, Chain& chain) const;
    bool add_buffer(const vring_desc& descriptor, Chain& chain) const;

    const GuestMemory* memory_;
    Setup setup_;
    std::span<std::byte> descriptors_;
    std::span<std::byte> available_;
    std::span<std::byte> used_;
    std::uint16_t next_available_ = 0;
    std::uint16_t used_index_ = 0;
    std::uint16_t interrupted_at_ = 0;  // used_index_ when the driver was last asked whether it wants an interrupt
    bool asked_ = false;
};

}  // namespace qcow::vhost_user
