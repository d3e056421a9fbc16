#include "server/vhost_user/inflight.h"

#include <algorithm>
#include <atomic>

namespace qcow::vhost_user {

// In the byte order of the machine, because a record never leaves it.

struct InflightRecord::Entry {
    std::uint8_t in_flight;
    std::uint8_t padding[5];
    std::uint16_t next;     // of the batch that was completed last
    std::uint64_t counter;  // tells the order in which requests were taken
};

struct InflightRecord::Header {
    std::uint64_t features;
    std::uint16_t version;  // 1; 0: the memory is new
    std::uint16_t size;
    std::uint16_t last_batch_head;
    std::uint16_t completed;
};

namespace {

constexpr std::uint64_t alignment = 64;

/// In the order of the program, because this process can end between any two of these.
template <class T>
void store(T& field, T value) {
    std::atomic_ref(field).store(value, std::memory_order_release);
}

template <class T>
T load(T& field) {
    return std::atomic_ref(field).load(std::memory_order_acquire);
}

}  // namespace

std::uint64_t InflightRecord::bytes_for(std::uint16_t size) {
    const auto bytes = sizeof(Header) + std::uint64_t{size} * sizeof(Entry);
    return (bytes + alignment - 1) / alignment * alignment;
}

InflightRecord::Header& InflightRecord::header() const { return *reinterpret_cast<Header*>(memory_.data()); }

InflightRecord::Entry& InflightRecord::entry(std::uint16_t head) const {
    return *reinterpret_cast<Entry*>(memory_.data() + sizeof(Header) + head * sizeof(Entry));
}

std::vector<std::uint16_t> InflightRecord::recover(std::uint16_t completed) {
    if (load(header().version) != 1) {
        store(header().size, size_);
        store(header().completed, completed);
        store(header().version, std::uint16_t{1});
        return {};
    }
    // The driver has seen the last batch, while the record still calls it in flight. Ours have one request.
    auto head = load(header().last_batch_head);
    for (auto left = static_cast<std::uint16_t>(completed - load(header().completed)); left > 0 && head < size_;
         --left) {
        store(entry(head).in_flight, std::uint8_t{0});
        head = load(entry(head).next);
    }
    store(header().completed, completed);
    std::vector<std::pair<std::uint64_t, std::uint16_t>> found;
    for (std::uint16_t i = 0; i < size_; ++i)
        if (load(entry(i).in_flight) == 1) found.emplace_back(load(entry(i).counter), i);
    std::ranges::sort(found);
    if (!found.empty()) counter_ = found.back().first + 1;
    std::vector<std::uint16_t> heads;
    heads.reserve(found.size());
    for (const auto& [counter, taken] : found) heads.push_back(taken);
    return heads;
}

void InflightRecord::begin(std::uint16_t head) {
    store(entry(head).counter, counter_++);
    store(entry(head).in_flight, std::uint8_t{1});
}

void InflightRecord::will_complete(std::uint16_t head) {
    store(entry(head).next, load(header().last_batch_head));
    store(header().last_batch_head, head);
}

void InflightRecord::has_completed(std::uint16_t head, std::uint16_t completed) {
    store(entry(head).in_flight, std::uint8_t{0});
    store(header().completed, completed);
}

}  // namespace qcow::vhost_user
