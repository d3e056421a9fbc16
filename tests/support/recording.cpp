#include "support/recording.h"

#include "base/buffers.h"

namespace qcow::test {

StorageLog::Tick StorageLog::append(StorageEvent event) {
    const std::lock_guard lock(mutex_);
    return append_locked(std::move(event));
}

StorageLog::Tick StorageLog::append_locked(StorageEvent event) {
    events_.push_back(std::move(event));
    return events_.size() - 1;
}

Result<void> RecordingStorage::write(HostOffset at, ConstBuffers from) {
    StorageEvent event{Kind::write, file_, at.value, from.size(), gathered(from)};
    return log_.apply(std::move(event), [&] { return inner().write(at, from); });
}

Result<void> RecordingStorage::write_zeroes(HostOffset at, std::uint64_t length) {
    return log_.apply({Kind::zeroes, file_, at.value, length}, [&] { return inner().write_zeroes(at, length); });
}

Result<void> RecordingStorage::allocate(HostOffset at, std::uint64_t length) {
    // Space within the file changes no contents. Others may make the file longer meanwhile.
    const auto now = inner().size();
    if (!now) return std::unexpected(now.error());
    if (at.value + length <= *now) return inner().allocate(at, length);
    StorageEvent event{Kind::size, file_};
    return log_.apply(std::move(event), [&]() -> Result<void> {
        auto allocated = inner().allocate(at, length);
        event.length = inner().size().value_or(0);
        return allocated;
    });
}

Result<void> RecordingStorage::resize(std::uint64_t size) {
    return log_.apply({Kind::size, file_, 0, size}, [&] { return inner().resize(size); });
}

Result<void> RecordingStorage::flush() {
    const auto begun = log_.append({Kind::flush_begin, file_});
    if (flush_time_.count() != 0) std::this_thread::sleep_for(flush_time_);
    auto flushed = inner().flush();
    log_.append({flushed ? Kind::flush_end : Kind::flush_lost, file_, 0, 0, {}, begun});
    return flushed;
}

}  // namespace qcow::test
