#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>

#include "storage/file.h"

namespace qcow {

/// An event that wakes a thread that polls. Thread-safe; ring() is async-signal-safe.
class Wakeup {
public:
    Wakeup() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
    [[nodiscard]] int fd() const { return fd_.get(); }
    void ring() const noexcept {
        const std::uint64_t one = 1;
        [[maybe_unused]] const auto written = write(fd_.get(), &one, sizeof one);
    }
    void quiet() const {
        std::uint64_t count = 0;
        [[maybe_unused]] const auto n = read(fd_.get(), &count, sizeof count);
    }

private:
    FileDescriptor fd_;
};

}  // namespace qcow
