#pragma once
// A file with changes that are planned, and not made yet.

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "qcow/job.h"
#include "storage/pass_through.h"

namespace qcow {

/// Copies bytes within a file. What it does to them may depend on their places.
using CopyBytes = std::function<Result<void>(Storage& file, HostOffset from, HostOffset to, std::uint64_t bytes)>;

/// A CopyBytes that leaves them as they are.
Result<void> copy_unchanged(Storage& file, HostOffset from, HostOffset to, std::uint64_t bytes);

/// Keeps all changes in memory. Reads return the file as it will be; the file below stays as it is until carry_out().
///
/// flush() ends a step. carry_out() makes a step durable before it writes anything of the next one. The writes of one
/// step may reach the disk in any order.
///
/// Thread safety: as every Storage; but nobody may use it while carry_out() runs.
class PlannedFile final : public PassThrough {
public:
    /// `budget_bytes` bounds the memory for the changes.
    static Result<std::shared_ptr<PlannedFile>> create(std::shared_ptr<Storage> file, std::size_t budget_bytes);

    [[nodiscard]] Result<std::uint64_t> size() const override;
    Result<std::size_t> read(HostOffset at, Buffers to) const override;
    /// Errc::limit_exceeded if the changes need more memory than the budget.
    Result<void> write(HostOffset at, ConstBuffers from) override;
    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override;
    Result<void> allocate(HostOffset at, std::uint64_t length) override;
    /// Does not discard changes past the new end, since a later step may grow the file again.
    Result<void> resize(std::uint64_t size) override;
    Result<void> flush() override;
    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override;

    // Changes of data that the planner never reads. Reads do not show them.

    /// Copies bytes in the present step. They are what the steps before leave there.
    Result<void> copy(HostOffset from, HostOffset to, std::uint64_t bytes, CopyBytes how = copy_unchanged);
    /// Makes a hole when all steps are done.
    void punch(HostOffset at, std::uint64_t bytes);

    /// Whether carry_out() would change nothing.
    [[nodiscard]] bool unchanged() const;

    /// Makes all changes, durably. Reserves their space before the first write. Progress is in bytes written. Errors:
    /// Errc::no_space, with the file as it was, if there is no room; those of the file; Errc::cancelled between two
    /// steps.
    Result<void> carry_out(const JobControl& control);

private:
    static constexpr std::size_t page_bytes = 512;  // a sector, the unit that is written whole or not at all
    using Page = std::array<std::byte, page_bytes>;

    struct Copy {
        HostOffset from;
        HostOffset to;
        std::uint64_t bytes = 0;
        CopyBytes how;
    };
    struct Step {
        std::map<std::uint64_t, std::unique_ptr<Page>> pages;  // by number
        std::vector<Copy> copies;
        [[nodiscard]] bool empty() const { return pages.empty() && copies.empty(); }
    };

    PlannedFile(std::shared_ptr<Storage> file, std::uint64_t size, std::size_t budget_bytes);
    void set_size(std::uint64_t size);
    void grow(std::uint64_t end) { set_size(std::max(size_, end)); }
    Result<Page*> page_to_change(std::uint64_t number);
    template <class Visit>
    static Result<void> each_run(const Step& step, const Visit& visit);
    [[nodiscard]] Result<void> reserve() const;
    Result<void> carry_out_pages(const Step& step, std::uint64_t& done) const;

    mutable std::shared_mutex mutex_;  // of all below
    const std::size_t budget_bytes_;
    const std::uint64_t old_size_;
    std::uint64_t size_;
    std::uint64_t longest_;  // that the file ever is
    std::vector<Step> steps_ = std::vector<Step>(1);
    std::unordered_map<std::uint64_t, const Page*> now_;  // the newest version of each page that changes
    std::vector<std::pair<HostOffset, std::uint64_t>> holes_;
    std::size_t used_bytes_ = 0;
};

}  // namespace qcow
