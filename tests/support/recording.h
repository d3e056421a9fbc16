#pragma once
// What is done to files, written down in order: from it every state can be built that a power loss might leave.

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "storage/pass_through.h"
#include "support/bytes.h"

namespace qcow::test {

struct StorageEvent {
    enum class Kind : std::uint8_t {
        mark,         ///< nothing: a moment
        write,        ///< `bytes` at `at`
        zeroes,       ///< `length` bytes at `at`
        size,         ///< the file is `length` bytes long
        flush_begin,  ///< the flush that ends later makes what is before this durable
        flush_end,    ///< of the flush that began at event `begun`
        flush_lost,   ///< as flush_end, but it failed: what it was to make durable may never become so
    };
    Kind kind = Kind::mark;
    std::string file = {};
    std::uint64_t at = 0;
    std::uint64_t length = 0;
    Bytes bytes = {};
    std::size_t begun = 0;
};

/// The events of any number of files, in one order.
class StorageLog {
public:
    using Tick = std::size_t;  ///< an index into the events

    /// A moment between two events. The first one is 1: everything that is there at first is older.
    Tick mark() { return append({}); }

    Tick append(StorageEvent event);

    /// Changes a file and notes it as one step, so that the order of the log is the order in which things happened. The
    /// change may still complete the event.
    template <class Change>
    Result<void> apply(StorageEvent&& event, const Change& change) {
        const std::lock_guard lock(mutex_);
        auto changed = change();
        if (changed) append_locked(std::move(event));
        return changed;
    }

    /// Only while nobody adds to it.
    [[nodiscard]] const std::vector<StorageEvent>& events() const { return events_; }

    /// The log of a writer that would leave out every flush for which `left_out` says so, given its end.
    template <class Predicate>
    [[nodiscard]] StorageLog without_flushes(const Predicate& left_out) const {
        StorageLog result;
        result.events_ = events_;
        for (std::size_t i = 0; i < events_.size(); ++i) {
            if (events_[i].kind == StorageEvent::Kind::flush_end && left_out(i)) result.events_[i] = {};
        }
        return result;
    }

    StorageLog() = default;
    StorageLog(StorageLog&& other) noexcept : events_(std::move(other.events_)) {}

private:
    Tick append_locked(StorageEvent event);

    std::mutex mutex_;
    std::vector<StorageEvent> events_ = std::vector<StorageEvent>(1);
};

/// Notes all that changes the file below it. Flushes may be told to take their time, as those of disks do.
class RecordingStorage final : public PassThrough {
    using Kind = StorageEvent::Kind;

public:
    RecordingStorage(std::shared_ptr<Storage> inner, std::string file, StorageLog& log,
                     std::chrono::microseconds flush_time = {})
        : PassThrough(std::move(inner)), file_(std::move(file)), log_(log), flush_time_(flush_time) {}

    Result<void> write(HostOffset at, ConstBuffers from) override;

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override;

    Result<void> allocate(HostOffset at, std::uint64_t length) override;

    Result<void> resize(std::uint64_t size) override;

    Result<void> flush() override;

private:
    std::string file_;
    StorageLog& log_;
    std::chrono::microseconds flush_time_;
};

}  // namespace qcow::test
