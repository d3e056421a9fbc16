#include "storage/growing.h"

#include <algorithm>
#include <mutex>

#include "base/buffers.h"
#include "base/try.h"
#include "storage/pass_through.h"

namespace qcow {
namespace {

class GrowingStorage final : public PassThrough {
public:
    using PassThrough::PassThrough;

    [[nodiscard]] Result<std::uint64_t> size() const override {
        const std::lock_guard lock(mutex_);
        return end_;
    }

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        const auto there = std::min<std::uint64_t>(to.size(), left_at(at));
        if (there != 0) TRY(inner().read(at, to.first(there)));
        fill_zeros(to.subspan(there));
        return there;
    }

    Result<void> write(HostOffset at, ConstBuffers from) override {
        if (from.empty()) return {};
        const std::lock_guard lock(mutex_);
        TRY_VOID(verify_room(at.value + from.size()));
        TRY_VOID(grow_to(at.value));
        TRY_VOID(inner().write(at, from));
        end_ = std::max(end_, at.value + from.size());
        return {};
    }

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        const std::lock_guard lock(mutex_);
        length = at.value >= end_ ? 0 : std::min(length, end_ - at.value);
        return length == 0 ? Result<void>() : inner().write_zeroes(at, length);
    }

    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        // NOLINTNEXTLINE(bugprone-parent-virtual-call): by writes of this class, which know the end
        return length == 0 ? Result<void>() : Storage::allocate(at, length);
    }

    Result<void> resize(std::uint64_t size) override {
        const std::lock_guard lock(mutex_);
        TRY_VOID(verify_room(size));
        TRY_VOID(grow_to(size));
        end_ = size;
        return {};
    }

    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override {
        const auto there = left_at(at);
        return there == 0 ? Run{false, limit} : inner().run(at, std::min(limit, there));
    }

private:
    [[nodiscard]] std::uint64_t left_at(HostOffset at) const {
        const std::lock_guard lock(mutex_);
        return at.value >= end_ ? 0 : end_ - at.value;
    }

    Result<void> verify_room(std::uint64_t size) {
        return size > TRY(inner().size()) ? inner().resize(size) : Result<void>();
    }

    Result<void> grow_to(std::uint64_t size) {
        if (size <= end_) return {};
        TRY_VOID(inner().write_zeroes({end_}, size - end_));
        end_ = size;
        return {};
    }

    mutable std::mutex mutex_;  // also held while writing: growing must not make zeros of what another thread writes
    std::uint64_t end_ = 0;
};

}  // namespace

Result<std::shared_ptr<Storage>> as_empty(std::shared_ptr<Storage> storage) {
    TRY_VOID(storage->resize(0));
    if (TRY(storage->size()) == 0) return storage;
    return std::make_shared<GrowingStorage>(std::move(storage));
}

}  // namespace qcow
