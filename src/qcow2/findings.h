#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "qcow/check.h"

namespace qcow::qcow2 {

/// Collects what a check finds, from several threads, and puts it in the order of the file.
class Findings {
public:
    explicit Findings(std::size_t max_kept) : max_kept_(max_kept) {}

    /// `order`: the host offset that it is about. `count`: how many clusters or faults this one stands for.
    /// `make()` gives the finding, with its texts. It is called only for what is kept: there may be millions.
    template <class Make>
    void add(CheckFinding::Severity severity, std::uint64_t order, std::uint64_t count, const Make& make) {
        if (count_one(severity, count)) keep({order, make()});
    }

    void move_to(CheckReport& report);

private:
    struct Kept {
        std::uint64_t order;
        CheckFinding finding;
    };

    std::vector<Kept>& list_of(CheckFinding::Severity severity) {
        return severity == CheckFinding::Severity::postponed ? kept_postponed_ : kept_;
    }

    /// Whether it is to be kept.
    bool count_one(CheckFinding::Severity severity, std::uint64_t count);
    void keep(Kept finding);

    std::mutex mutex_;
    std::size_t max_kept_;
    std::vector<Kept> kept_;
    std::vector<Kept> kept_postponed_;  // which take no room from the others
    std::uint64_t leaks_ = 0;
    std::uint64_t corruptions_ = 0;
    std::uint64_t errors_ = 0;
    std::uint64_t postponed_ = 0;
};

}  // namespace qcow::qcow2
