#include "server/vhost_user/split_ring.h"

#include <atomic>
#include <bit>
#include <cstddef>
#include <utility>

#include "base/buffers.h"

namespace qcow::vhost_user {
namespace {

// The parts of `available` and `used`: flags, index, ring, event.
constexpr std::size_t flags_at = 0;
constexpr std::size_t index_at = 2;
constexpr std::size_t ring_at = 4;
constexpr std::size_t available_entry = 2;
constexpr std::size_t used_entry = 8;

/// Bytes of a request's buffers, so that its time is bounded.
constexpr std::uint64_t max_bytes = std::uint64_t{1} << 30;

/// Numbers of the ring are little-endian.
template <class T>
T from_ring(T value) {
    if constexpr (std::endian::native == std::endian::big) return std::byteswap(value);
    return value;
}

template <class T>
std::atomic_ref<T> word(std::span<std::byte> part, std::size_t at) {
    return std::atomic_ref<T>(*reinterpret_cast<T*>(part.data() + at));
}

vring_desc load_once(std::span<std::byte> table, std::size_t index) {
    const auto at = index * sizeof(vring_desc);
    constexpr auto relaxed = std::memory_order_relaxed;
    return {.addr = word<__virtio64>(table, at + offsetof(vring_desc, addr)).load(relaxed),
            .len = word<__virtio32>(table, at + offsetof(vring_desc, len)).load(relaxed),
            .flags = word<__virtio16>(table, at + offsetof(vring_desc, flags)).load(relaxed),
            .next = word<__virtio16>(table, at + offsetof(vring_desc, next)).load(relaxed)};
}

}  // namespace

Result<SplitRing> SplitRing::find(const GuestMemory& memory, const Setup& setup) {
    SplitRing ring(memory, setup);
    const auto& at = setup.addresses;
    const std::size_t event = 2;
    ring.descriptors_ = memory.at_user(at.descriptors, std::uint64_t{setup.size} * sizeof(vring_desc), 16);
    ring.available_ = memory.at_user(at.available, ring_at + std::uint64_t{setup.size} * available_entry + event, 2);
    ring.used_ = memory.at_user(at.used, ring_at + std::uint64_t{setup.size} * used_entry + event, 4);
    if (ring.descriptors_.empty() || ring.available_.empty() || ring.used_.empty())
        return fail(Errc::invalid_argument, "ring", "it does not lie in the guest's memory, or is not aligned");
    ring.next_available_ = setup.next_available;
    ring.used_index_ = from_ring(word<std::uint16_t>(ring.used_, index_at).load());
    ring.interrupted_at_ = ring.used_index_;
    return ring;
}

std::uint16_t SplitRing::available_index() const {
    return from_ring(word<std::uint16_t>(available_, index_at).load(std::memory_order_seq_cst));
}

bool SplitRing::is_empty() const { return available_index() == next_available_; }

Result<std::optional<std::uint16_t>> SplitRing::next() {
    const auto ready = static_cast<std::uint16_t>(available_index() - next_available_);
    if (ready == 0) return std::nullopt;
    if (ready > setup_.size) return fail(Errc::corrupt, "ring", "more requests are available than it has places");
    const auto place = ring_at + std::size_t{next_available_} % setup_.size * available_entry;
    const auto head = from_ring(word<std::uint16_t>(available_, place).load(std::memory_order_relaxed));
    if (head >= setup_.size) return fail(Errc::corrupt, "ring", "a request begins at a descriptor that does not exist");
    ++next_available_;
    return head;
}

bool SplitRing::load(std::uint16_t head, Chain& chain) const {
    chain.readable.clear();
    chain.writable.clear();
    chain.bytes = 0;
    return follow(head, setup_.size, [&](std::size_t i) { return load_once(descriptors_, i); }, chain, setup_.indirect);
}

/// Follows a chain through a table of `count` descriptors, which `at` returns.
template <class At>
bool SplitRing::follow(std::size_t index, std::size_t count, At at, Chain& chain, bool may_be_indirect) const {
    // More steps than descriptors are a loop.
    for (std::size_t steps = 0; index < count && steps < count; ++steps) {
        const vring_desc descriptor = at(index);
        const auto flags = from_ring(descriptor.flags);
        const bool more = (flags & VRING_DESC_F_NEXT) != 0;
        if ((flags & VRING_DESC_F_INDIRECT) != 0) return may_be_indirect && !more && load_table(descriptor, chain);
        if (!add_buffer(descriptor, chain)) return false;
        if (!more) return true;
        index = from_ring(descriptor.next);
    }
    return false;
}

bool SplitRing::load_table(const vring_desc& descriptor, Chain& chain) const {
    const auto length = from_ring(descriptor.len);
    const auto count = length / sizeof(vring_desc);
    if (count == 0 || count > max_size || length % sizeof(vring_desc) != 0) return false;
    std::vector<std::span<const std::byte>> pieces;
    if (!memory_->append(from_ring(descriptor.addr), length, pieces)) return false;
    chain.table.resize(count);
    gather(ConstBuffers(pieces), std::as_writable_bytes(std::span(chain.table)));
    return follow(0, count, [&](std::size_t i) { return chain.table[i]; }, chain, false);
}

bool SplitRing::add_buffer(const vring_desc& descriptor, Chain& chain) const {
    const auto address = from_ring(descriptor.addr);
    const auto length = from_ring(descriptor.len);
    chain.bytes += length;
    if (chain.bytes > max_bytes) return false;
    if ((from_ring(descriptor.flags) & VRING_DESC_F_WRITE) != 0)
        return memory_->append(address, length, chain.writable);
    return chain.writable.empty() && memory_->append(address, length, chain.readable);
}

void SplitRing::ask_for_kicks(bool wanted) {
    // The driver reads what is stored here after it has written the index that is_empty() reads next: both of these are
    // sequentially consistent, so that one of the two sees the other.
    if (setup_.event_index) {
        // The driver kicks when it passes this index. One that it has passed already spares it.
        if (wanted) {
            const auto at = ring_at + std::size_t{setup_.size} * used_entry;
            word<std::uint16_t>(used_, at).store(from_ring(next_available_), std::memory_order_seq_cst);
            if (setup_.addresses.logged) memory_->note_changed(setup_.addresses.log + at, 2);
        }
    } else {
        const std::uint16_t flags = wanted ? 0 : VRING_USED_F_NO_NOTIFY;
        word<std::uint16_t>(used_, flags_at).store(from_ring(flags), std::memory_order_seq_cst);
        if (setup_.addresses.logged) memory_->note_changed(setup_.addresses.log + flags_at, 2);
    }
}

void SplitRing::complete(std::uint16_t head, std::uint32_t written) {
    const auto at = ring_at + std::size_t{used_index_} % setup_.size * used_entry;
    word<std::uint32_t>(used_, at).store(from_ring(std::uint32_t{head}), std::memory_order_relaxed);
    word<std::uint32_t>(used_, at + 4).store(from_ring(written), std::memory_order_relaxed);
    ++used_index_;
    word<std::uint16_t>(used_, index_at).store(from_ring(used_index_), std::memory_order_release);
    if (setup_.addresses.logged) {
        memory_->note_changed(setup_.addresses.log + at, used_entry);
        memory_->note_changed(setup_.addresses.log + index_at, 2);
    }
}

bool SplitRing::wants_interrupt() {
    // The driver asks for interrupts, and then looks at the index that complete() has written. This store of the same
    // index keeps the loads below behind it.
    word<std::uint16_t>(used_, index_at).store(from_ring(used_index_), std::memory_order_seq_cst);
    if (!setup_.event_index) {
        const auto flags = from_ring(word<std::uint16_t>(available_, flags_at).load(std::memory_order_seq_cst));
        return (flags & VRING_AVAIL_F_NO_INTERRUPT) == 0;
    }
    const auto at = ring_at + std::size_t{setup_.size} * available_entry;
    const auto event = from_ring(word<std::uint16_t>(available_, at).load(std::memory_order_seq_cst));
    const auto before = std::exchange(interrupted_at_, used_index_);
    const auto behind = static_cast<std::uint16_t>(used_index_ - event - 1);
    const bool passed = behind < static_cast<std::uint16_t>(used_index_ - before);
    // Nobody knows what the driver has heard of what was completed before this ring was found.
    return std::exchange(asked_, true) ? passed : true;
}

}  // namespace qcow::vhost_user
