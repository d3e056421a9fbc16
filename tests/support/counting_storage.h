#pragma once
// A Storage that counts what is asked of it.

#include <atomic>

#include "storage/pass_through.h"

namespace qcow::test {

class CountingStorage final : public PassThrough {
public:
    using PassThrough::PassThrough;

    Result<void> write(HostOffset at, ConstBuffers from) override {
        ++writes;
        return PassThrough::write(at, from);
    }
    Result<void> flush() override {
        ++flushes;
        return PassThrough::flush();
    }

    std::atomic<std::uint64_t> writes = 0;
    std::atomic<std::uint64_t> flushes = 0;
};

}  // namespace qcow::test
