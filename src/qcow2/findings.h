#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "qcow/check.h"

namespace qcow::qcow2 {

/// Collects what a check finds, from several threads, and puts it in the order of the file.
class Findings {
public:
    explicit Findings(std::size_t max_kept) : max_kept_(max_kept) {}

    /// `order`: the host offset that it is about. `count`: how many clusters or faults this one stands for.
    void add(CheckFinding::Severity severity, std::uint64_t order, std::string place, std::string what,
             std::uint64_t count = 1);

    void move_to(CheckReport& report);

private:
    struct Kept {
        std::uint64_t order;
        CheckFinding finding;
    };
    std::mutex mutex_;
    std::size_t max_kept_;
    std::vector<Kept> kept_;
    std::uint64_t leaks_ = 0;
    std::uint64_t corruptions_ = 0;
    std::uint64_t errors_ = 0;
};

}  // namespace qcow::qcow2
