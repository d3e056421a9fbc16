#include "storage/planned_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "base/buffers.h"
#include "base/going_on.h"

namespace qcow {
namespace {

constexpr std::size_t piece_bytes = 1 * MiB;

}  // namespace

Result<void> copy_unchanged(Storage& file, HostOffset from, HostOffset to, std::uint64_t bytes) {
    std::vector<std::byte> buffer(std::min<std::uint64_t>(bytes, piece_bytes));
    for (std::uint64_t done = 0; done < bytes; done += buffer.size()) {
        const auto piece = std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), bytes - done));
        TRY(file.read(from + done, piece));
        TRY_VOID(file.write(to + done, piece));
    }
    return {};
}

Result<std::shared_ptr<PlannedFile>> PlannedFile::create(std::shared_ptr<Storage> file, std::size_t budget_bytes) {
    const auto size = TRY(file->size());
    return std::shared_ptr<PlannedFile>(new PlannedFile(std::move(file), size, budget_bytes));
}

PlannedFile::PlannedFile(std::shared_ptr<Storage> file, std::uint64_t size, std::size_t budget_bytes)
    : PassThrough(std::move(file)), budget_bytes_(budget_bytes), old_size_(size), size_(size), longest_(size) {}

Result<std::uint64_t> PlannedFile::size() const {
    const std::shared_lock lock(mutex_);
    return size_;
}

Result<std::size_t> PlannedFile::read(HostOffset at, Buffers to) const {
    const std::shared_lock lock(mutex_);
    const std::uint64_t there = at.value >= size_ ? 0 : std::min<std::uint64_t>(to.size(), size_ - at.value);
    TRY(inner().read(at, to));
    if (now_.empty()) return there;
    for (std::uint64_t done = 0; done < there;) {
        const std::uint64_t number = (at.value + done) / page_bytes;
        const std::uint64_t begin = (at.value + done) % page_bytes;
        const auto length = std::min<std::uint64_t>(there - done, page_bytes - begin);
        if (const auto found = now_.find(number); found != now_.end())
            scatter(std::span(*found->second).subspan(begin, length), to.subspan(done, length));
        done += length;
    }
    fill_zeros(to.subspan(there));
    return there;
}

Result<PlannedFile::Page*> PlannedFile::page_to_change(std::uint64_t number) {
    auto& page = steps_.back().pages[number];
    if (page) return page.get();
    constexpr std::size_t page_cost = page_bytes + 128;  // with its places in the two maps
    if (page_cost > budget_bytes_ - used_bytes_) {
        steps_.back().pages.erase(number);
        return fail(
            Errc::limit_exceeded, name(),
            fmt::format("the changes need more than the {} KiB of memory that were allowed", budget_bytes_ / KiB));
    }
    used_bytes_ += page_cost;
    page = std::make_unique<Page>();
    if (const auto found = now_.find(number); found != now_.end()) {
        *page = *found->second;
    } else {
        TRY(inner().read({number * page_bytes}, *page));
    }
    now_[number] = page.get();
    return page.get();
}

Result<void> PlannedFile::write(HostOffset at, ConstBuffers from) {
    const std::unique_lock lock(mutex_);
    for (std::size_t done = 0; done < from.size();) {
        const std::uint64_t begin = (at.value + done) % page_bytes;
        const auto length = std::min<std::size_t>(from.size() - done, page_bytes - begin);
        auto* page = TRY(page_to_change((at.value + done) / page_bytes));
        gather(from.subspan(done, length), std::span(*page).subspan(begin));
        done += length;
    }
    grow(at.value + from.size());
    return {};
}

Result<void> PlannedFile::write_zeroes(HostOffset at, std::uint64_t length) {
    const std::vector<std::byte> zeros(std::min<std::uint64_t>(length, 64 * KiB));
    const auto size = TRY(this->size());
    const std::uint64_t end = at.value >= size ? at.value : at.value + std::min(length, size - at.value);
    while (at.value < end) {
        const auto piece = std::min<std::uint64_t>(zeros.size(), end - at.value);
        TRY_VOID(write(at, std::span(zeros).first(piece)));
        at += piece;
    }
    return {};
}

Result<void> PlannedFile::allocate(HostOffset at, std::uint64_t length) {
    const std::unique_lock lock(mutex_);
    grow(at.value + length);
    return {};
}

Result<void> PlannedFile::resize(std::uint64_t size) {
    const std::unique_lock lock(mutex_);
    set_size(size);
    return {};
}

void PlannedFile::set_size(std::uint64_t size) {
    size_ = size;
    longest_ = std::max(longest_, size);
}

Result<void> PlannedFile::flush() {
    const std::unique_lock lock(mutex_);
    if (!steps_.back().empty()) steps_.emplace_back();
    return {};
}

Result<Storage::Run> PlannedFile::run(HostOffset at, std::uint64_t limit) const {
    const std::shared_lock lock(mutex_);
    if (now_.empty()) return inner().run(at, limit);
    const auto changed = [&](std::uint64_t offset) { return now_.contains(offset / page_bytes); };
    const auto next_page = [&](std::uint64_t offset) { return (offset / page_bytes + 1) * page_bytes; };
    if (at.value >= size_) return Run{false, limit};
    if (changed(at.value)) return Run{true, std::min(limit, next_page(at.value) - at.value)};
    auto run = TRY(inner().run(at, limit));
    if (run.data) return run;
    // A hole ends where the first change in it begins.
    const std::uint64_t end = at.value + run.length;
    if (run.length / page_bytes > now_.size()) {
        auto first = end;
        for (const auto& [number, page] : now_) {
            if (number * page_bytes > at.value) first = std::min(first, number * page_bytes);
        }
        return Run{false, first - at.value};
    }
    for (std::uint64_t offset = next_page(at.value); offset < end; offset += page_bytes) {
        if (changed(offset)) return Run{false, offset - at.value};
    }
    return run;
}

Result<void> PlannedFile::copy(HostOffset from, HostOffset to, std::uint64_t bytes, CopyBytes how) {
    const std::unique_lock lock(mutex_);
    steps_.back().copies.push_back({from, to, bytes, std::move(how)});
    grow(to.value + bytes);
    return {};
}

void PlannedFile::punch(HostOffset at, std::uint64_t bytes) {
    const std::unique_lock lock(mutex_);
    if (!holes_.empty() && holes_.back().first + holes_.back().second == at) {
        holes_.back().second += bytes;
    } else {
        holes_.emplace_back(at, bytes);
    }
}

bool PlannedFile::unchanged() const {
    return steps_.size() == 1 && steps_.front().empty() && holes_.empty() && size_ == old_size_;
}

/// Calls visit(pages, end) for each run of neighbouring pages.
template <class Visit>
Result<void> PlannedFile::each_run(const Step& step, const Visit& visit) {
    for (auto page = step.pages.begin(); page != step.pages.end();) {
        const auto begin = page;
        std::uint64_t number = page->first;
        while (page != step.pages.end() && page->first == number && number - begin->first < piece_bytes / page_bytes) {
            ++page;
            ++number;
        }
        TRY_VOID(visit(begin, page));
    }
    return {};
}

/// Neighbours are written together.
Result<void> PlannedFile::carry_out_pages(const Step& step, std::uint64_t& done) const {
    std::vector<std::byte> buffer;
    return each_run(step, [&](auto page, auto end) -> Result<void> {
        const HostOffset at{page->first * page_bytes};
        buffer.clear();
        for (; page != end; ++page) buffer.insert(buffer.end(), page->second->begin(), page->second->end());
        // The last sector of the file may be incomplete.
        const auto length = std::min<std::uint64_t>(buffer.size(), longest_ - std::min(longest_, at.value));
        TRY_VOID(inner().write(at, std::span(buffer).first(length)));
        done += buffer.size();
        return {};
    });
}

/// So that no step meets a full disk after others were carried out.
Result<void> PlannedFile::reserve() const {
    const auto reserve = [&](HostOffset at, std::uint64_t bytes) -> Result<void> {
        const std::uint64_t end = std::min(at.value + bytes, longest_);
        return at.value < end ? inner().allocate(at, end - at.value) : Result<void>();
    };
    for (const auto& step : steps_) {
        for (const auto& copy : step.copies) TRY_VOID(reserve(copy.to, copy.bytes));
        TRY_VOID(each_run(
            step,
            [&](auto begin, auto end) {
                return reserve({begin->first * page_bytes},
                               static_cast<std::uint64_t>(std::distance(begin, end)) * page_bytes);
            }));
    }
    return {};
}

Result<void> PlannedFile::carry_out(const JobControl& control) {
    if (auto reserved = reserve(); !reserved) {
        if (TRY(inner().size()) != old_size_) TRY_VOID(inner().resize(old_size_));
        return reserved;
    }
    std::uint64_t total = 0;
    std::uint64_t done = 0;
    for (const auto& step : steps_) {
        total += step.pages.size() * page_bytes;
        for (const auto& copy : step.copies) total += copy.bytes;
    }
    const auto report = [&] {
        if (control.progress && total != 0) control.progress(done, total);
    };
    for (const auto& step : steps_) {
        if (step.empty()) continue;
        TRY_VOID(verify_goes_on(control));
        for (const auto& copy : step.copies) {
            TRY_VOID(copy.how(inner(), copy.from, copy.to, copy.bytes));
            done += copy.bytes;
            report();
        }
        TRY_VOID(carry_out_pages(step, done));
        TRY_VOID(inner().flush());
        report();
    }
    for (const auto& [begin, bytes] : holes_) {
        for (HostOffset at = begin; at < begin + bytes;) {
            const auto run = TRY(inner().run(at, begin.value + bytes - at.value));
            if (run.data) TRY_VOID(inner().write_zeroes(at, run.length));
            at += run.length;
        }
    }
    if (TRY(inner().size()) != size_) TRY_VOID(inner().resize(size_));
    if (!holes_.empty() || size_ != old_size_) TRY_VOID(inner().flush());
    return {};
}

}  // namespace qcow
