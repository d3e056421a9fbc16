#pragma once
// A file in memory that is written to: sparse, so that one which claims 2^62 bytes costs nothing, and with little room.

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "base/bits.h"
#include "fuzz/sparse_files.h"
#include "qcow/storage.h"

namespace qcow::fuzz {

/// For one thread. Zeros take no room; the rest does, and where there is none left writes fail with Errc::no_space.
class WritableStorage final : public Storage {
public:
    static constexpr std::uint64_t max_stored_bytes = 8 * MiB;
    static constexpr std::uint64_t max_growth = 512 * MiB;  // of the length, holes included

    WritableStorage(const SparseFile& file, std::string name);

    /// Another file that has the same contents now, and tells nobody what happens to it.
    [[nodiscard]] std::shared_ptr<WritableStorage> copy() const;

    /// Told of every change before it is made.
    struct Watcher {
        std::function<void(HostOffset, std::span<const std::byte>)> write;
        std::function<void(HostOffset, std::uint64_t)> lose;  ///< these bytes become zeros, or are cut off
    };
    void watch(Watcher watcher) { watcher_ = std::move(watcher); }

    /// Whether something was not written for want of room.
    [[nodiscard]] bool refused() const { return refused_; }

    [[nodiscard]] const std::string& name() const override { return name_; }
    [[nodiscard]] std::string identity() const override;
    [[nodiscard]] Result<std::uint64_t> size() const override { return size_; }
    [[nodiscard]] Result<std::uint64_t> allocated() const override { return pages_.size() * page_bytes; }
    Result<std::size_t> read(HostOffset at, Buffers to) const override;
    Result<void> write(HostOffset at, ConstBuffers pieces) override;
    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override;
    Result<void> resize(std::uint64_t size) override;
    Result<void> flush() override { return {}; }
    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override;

private:
    static constexpr std::uint64_t page_bytes = 512;
    using Page = std::array<std::byte, page_bytes>;

    void store(std::uint64_t at, std::span<const std::byte> from);
    void drop(std::uint64_t at, std::uint64_t end);
    [[nodiscard]] std::unexpected<Error> no_space();

    std::map<std::uint64_t, Page> pages_;  // by number; what is missing is zeros
    std::uint64_t size_ = 0;
    std::uint64_t max_size_ = 0;
    std::string name_;
    Watcher watcher_;
    bool refused_ = false;
};

}  // namespace qcow::fuzz
