#include "storage/redo_log.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/bits.h"
#include "base/invariant.h"

namespace qcow {

// In the byte order of the machine, because a log never leaves it.

struct RedoLog::Half {
    std::uint64_t sequence;  // the half with the lower number was begun first
    std::uint64_t used;      // bytes of complete records
};

struct RedoLog::Header {
    std::uint64_t version;  // log_version; anything else: there is no log
    std::array<Half, 2> halves;
};

namespace {

constexpr std::uint64_t log_version = 0x716c6f6701;
constexpr std::size_t header_bytes = 64;
constexpr std::uint64_t max_offset = bit(56);

/// The words before and after follow it.
struct Record {
    std::uint64_t at;
    std::uint64_t count;
};

/// In the order of the program, because the process can end between any two stores.
void publish(std::uint64_t& field, std::uint64_t value) {
    std::atomic_ref(field).store(value, std::memory_order_release);
}

}  // namespace

std::size_t RedoLog::half_bytes(std::size_t memory_bytes) { return (memory_bytes - header_bytes) / 2 / 8 * 8; }

RedoLog::Header& RedoLog::header() const { return *reinterpret_cast<Header*>(memory_.bytes.data()); }

RedoLog::RedoLog(SurvivingMemory memory) : memory_(std::move(memory)) {
    static_assert(sizeof(Header) <= header_bytes);
    INVARIANT(memory_.bytes.size() >= min_bytes);
    publish(header().version, 0);
    header().halves = {Half{++sequence_, 0}, Half{0, 0}};
    publish(header().version, log_version);
}

void RedoLog::set_used(std::size_t half, std::size_t bytes) {
    used_[half] = bytes;
    publish(header().halves[half].used, bytes);
}

bool RedoLog::append(HostOffset at, std::span<const std::uint64_t> before, std::span<const std::uint64_t> after) {
    INVARIANT(before.size() == after.size());
    const std::lock_guard lock(mutex_);
    const std::size_t size = half_bytes(memory_.bytes.size());
    const std::size_t used = used_[active_];
    const std::size_t needed = sizeof(Record) + before.size_bytes() + after.size_bytes();
    if (needed > size - used) return false;
    auto* to = memory_.bytes.data() + header_bytes + active_ * size + used;
    const Record record{at.value, before.size()};
    std::memcpy(to, &record, sizeof record);
    std::memcpy(to + sizeof record, before.data(), before.size_bytes());
    std::memcpy(to + sizeof record + before.size_bytes(), after.data(), after.size_bytes());
    set_used(active_, used + needed);
    return true;
}

void RedoLog::begin_writing() {
    const std::lock_guard lock(mutex_);
    // After a write that failed, both halves have stores that the file may lack.
    if (used_[1 - active_] != 0) return;
    active_ = 1 - active_;
    publish(header().halves[active_].sequence, ++sequence_);
}

void RedoLog::end_writing() {
    const std::lock_guard lock(mutex_);
    set_used(1 - active_, 0);
}

std::vector<RedoLog::Store> RedoLog::read(std::span<const std::byte> memory) {
    if (memory.size() < min_bytes) return {};
    Header header;
    std::memcpy(&header, memory.data(), sizeof header);
    if (header.version != log_version) return {};
    const std::size_t size = half_bytes(memory.size());
    std::vector<Store> stores;
    const auto read_half = [&](std::size_t index) {
        auto half = memory.subspan(header_bytes + index * size, size);
        half = half.first(std::min<std::uint64_t>(size, header.halves[index].used));
        Record record;
        while (half.size() >= sizeof record) {
            std::memcpy(&record, half.data(), sizeof record);
            half = half.subspan(sizeof record);
            if (record.count > half.size() / 16 || record.at % 8 != 0 || record.at >= max_offset) return;
            for (std::size_t i = 0; i < record.count; ++i) {
                Store store{HostOffset{record.at + i * 8}};
                std::memcpy(&store.before, half.data() + i * 8, 8);
                std::memcpy(&store.after, half.data() + (record.count + i) * 8, 8);
                stores.push_back(store);
            }
            half = half.subspan(record.count * 16);
        }
    };
    const std::size_t first = header.halves[0].sequence <= header.halves[1].sequence ? 0 : 1;
    read_half(first);
    read_half(1 - first);
    return stores;
}

}  // namespace qcow
