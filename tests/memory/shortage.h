#pragma once
// Allocations of memory that fail. The program's operator new asks `shortage` (see shortage.cpp).

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>

#include "qcow/error.h"

namespace qcow::test {

/// Which allocations fail: those made while the engine works, from number `after` on, `times` of them.
struct Shortage {
    bool engine_works = false;
    std::uint64_t after = ~std::uint64_t{0};
    std::uint64_t times = 1;
    std::uint64_t count = 0;
    std::uint64_t hits = 0;

    /// Whether the next one does.
    bool strikes() {
        if (!engine_works) return false;
        const auto n = count++;
        if (n < after || n - after >= times) return false;
        ++hits;
        return true;
    }
};

extern thread_local Shortage shortage;

/// The engine is at work, or something else is again, as long as this lives.
class Works {
public:
    explicit Works(bool engine) : before_(std::exchange(shortage.engine_works, engine)) {}
    Works(const Works&) = delete;
    Works& operator=(const Works&) = delete;
    ~Works() { shortage.engine_works = before_; }

private:
    bool before_;
};

/// Lets each allocation of the caller's thread fail in turn. `work` returns a Result, which must then be
/// Errc::no_memory, unless it could do without.
template <class Work>
void expect_no_memory(const Work& work) {
    const auto run = [&](Shortage given) {
        shortage = given;
        auto result = work();
        shortage.engine_works = false;
        return result;
    };
    {
        const auto enough = run({.engine_works = true});
        ASSERT_TRUE(enough) << enough.error().message();
    }
    const auto allocations = shortage.count;
    ASSERT_GT(allocations, 0U);
    unsigned failures = 0;
    for (std::uint64_t i = 0; i < allocations; ++i) {
        const auto result = run({.engine_works = true, .after = i});
        if (result) continue;
        ASSERT_EQ(result.error().code, Errc::no_memory) << result.error().message();
        ++failures;
    }
    EXPECT_GT(failures, 0U);
    shortage = {};
}

}  // namespace qcow::test
