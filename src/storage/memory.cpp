#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <shared_mutex>

#include "base/bits.h"
#include "base/buffers.h"
#include "base/try.h"
#include "qcow/storage.h"

namespace qcow {
namespace {

class MemoryStorage final : public Storage {
public:
    MemoryStorage(std::vector<std::byte> bytes, std::string name) : bytes_(std::move(bytes)), name_(std::move(name)) {}

    [[nodiscard]] const std::string& name() const override { return name_; }
    [[nodiscard]] std::string identity() const override {
        return fmt::format("memory:{}", static_cast<const void*>(this));
    }

    [[nodiscard]] Result<std::uint64_t> size() const override {
        const std::shared_lock lock(mutex_);
        return bytes_.size();
    }

    [[nodiscard]] Result<std::uint64_t> allocated() const override { return size(); }

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        const std::shared_lock lock(mutex_);
        const std::size_t there =
            at.value >= bytes_.size() ? 0 : std::min<std::size_t>(to.size(), bytes_.size() - at.value);
        if (there != 0) scatter(std::span(bytes_).subspan(at.value, there), to);
        fill_zeros(to.subspan(there));
        return there;
    }

    Result<void> write(HostOffset at, ConstBuffers from) override {
        if (from.empty()) return {};
        if (at.value > bytes_.max_size() - from.size()) return too_large(at.value);
        const std::lock_guard lock(mutex_);
        if (at.value + from.size() > bytes_.size()) TRY_VOID(set_size(at.value + from.size()));
        gather(from, std::span(bytes_).subspan(at.value));
        return {};
    }

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        const std::lock_guard lock(mutex_);
        if (at.value >= bytes_.size() || length == 0) return {};
        std::memset(bytes_.data() + at.value, 0, std::min<std::uint64_t>(length, bytes_.size() - at.value));
        return {};
    }

    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        if (length > bytes_.max_size() || at.value > bytes_.max_size() - length) return too_large(at.value);
        const std::lock_guard lock(mutex_);
        return at.value + length > bytes_.size() ? set_size(at.value + length) : Result<void>();
    }

    Result<void> resize(std::uint64_t size) override {
        const std::lock_guard lock(mutex_);
        return set_size(size);
    }

    Result<void> flush() override { return {}; }

    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override {
        const std::uint64_t end = TRY(size());
        if (at.value >= end) return Run{false, limit};
        return Run{true, std::min(limit, end - at.value)};
    }

private:
    [[nodiscard]] std::unexpected<Error> too_large(std::uint64_t size) const {
        return fail(Errc::no_space, name_, fmt::format("{} bytes do not fit in memory", size));
    }

    Result<void> set_size(std::uint64_t size) {
        if (size > bytes_.max_size()) return too_large(size);
        try {
            bytes_.resize(size);
        } catch (const std::bad_alloc&) {
            return too_large(size);
        }
        return {};
    }

    mutable std::shared_mutex mutex_;  // shared to read
    std::vector<std::byte> bytes_;
    std::string name_;
};

}  // namespace

std::shared_ptr<Storage> memory_storage(std::vector<std::byte> bytes, std::string name) {
    return std::make_shared<MemoryStorage>(std::move(bytes), std::move(name));
}

}  // namespace qcow
