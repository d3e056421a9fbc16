#pragma once
// A Storage that fails when it is told to, or when there is no room.

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <vector>

#include "storage/pass_through.h"
#include "support/bytes.h"
#include "support/result.h"

namespace qcow::test {

/// The free blocks of a file system, which several files share. They may be taken away and given back at any time.
class FreeBlocks {
public:
    static constexpr std::uint64_t block_bytes = 4096;

    /// From now on there are so many; nothing: as many as anybody wants.
    void set(std::optional<std::uint64_t> blocks) {
        const std::lock_guard lock(mutex_);
        free_ = blocks;
    }

    /// How many of `wanted` there are.
    std::uint64_t take(std::uint64_t wanted) {
        const std::lock_guard lock(mutex_);
        const auto given = free_ ? std::min(wanted, *free_) : wanted;
        if (free_) *free_ -= given;
        taken_ += given;
        if (given < wanted) ++refused_;
        return given;
    }

    void give(std::uint64_t blocks) {
        const std::lock_guard lock(mutex_);
        if (free_) *free_ += blocks;
    }

    [[nodiscard]] std::uint64_t taken() const {
        const std::lock_guard lock(mutex_);
        return taken_;
    }
    [[nodiscard]] std::uint64_t refused() const {
        const std::lock_guard lock(mutex_);
        return refused_;
    }

private:
    mutable std::mutex mutex_;
    std::optional<std::uint64_t> free_;
    std::uint64_t taken_ = 0;
    std::uint64_t refused_ = 0;
};

/// A file in those blocks. What is written where none are takes some, what is punched or cut off gives them back, and
/// overwriting takes none. A request that finds too few does as much as it can, and keeps the blocks that it has got.
class SparseStorage final : public PassThrough {
public:
    /// Blocks of which there are only zeros at first are holes, or are not.
    enum class Zeros : bool { blocks, holes };

    SparseStorage(std::shared_ptr<Storage> inner, std::shared_ptr<FreeBlocks> free, Zeros zeros)
        : PassThrough(std::move(inner)), free_(std::move(free)) {
        Bytes bytes(must(this->inner().size()));
        must(this->inner().read({0}, bytes));
        for (std::uint64_t at = 0; at < bytes.size(); at += block) {
            const auto contents = std::span(bytes).subspan(at, std::min<std::uint64_t>(block, bytes.size() - at));
            there_.push_back(zeros == Zeros::blocks ||
                             std::ranges::any_of(contents, [](std::byte b) { return b != std::byte{0}; }));
        }
    }

    Result<void> write(HostOffset at, std::span<const std::byte> from) override {
        const std::lock_guard lock(mutex_);
        const auto done = take(at.value, at.value + from.size());
        if (done == at.value + from.size()) return inner().write(at, from);
        if (done > at.value) must(inner().write(at, from.first(done - at.value)));
        return full();
    }

    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        const std::lock_guard lock(mutex_);
        if (take(at.value, at.value + length) < at.value + length) return full();
        return inner().allocate(at, length);
    }

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        const std::lock_guard lock(mutex_);
        give((at.value + block - 1) / block, (at.value + length) / block);
        return inner().write_zeroes(at, length);
    }

    Result<void> resize(std::uint64_t size) override {
        const std::lock_guard lock(mutex_);
        give((size + block - 1) / block, there_.size());
        return inner().resize(size);
    }

private:
    static constexpr std::uint64_t block = FreeBlocks::block_bytes;

    /// Returns up to where there are blocks now.
    std::uint64_t take(std::uint64_t begin, std::uint64_t end) {
        there_.resize(std::max<std::size_t>(there_.size(), (end + block - 1) / block));
        for (auto i = begin / block; i * block < end; ++i) {
            if (there_[i]) continue;
            if (free_->take(1) == 0) return std::max(begin, i * block);
            there_[i] = true;
        }
        return end;
    }

    void give(std::uint64_t first, std::uint64_t end) {
        for (auto i = first; i < std::min<std::uint64_t>(end, there_.size()); ++i) {
            if (there_[i]) free_->give(1);
            there_[i] = false;
        }
    }

    [[nodiscard]] std::unexpected<Error> full() const {
        return std::unexpected(Error{Errc::no_space, name(), "no block is free in the test"});
    }

    std::shared_ptr<FreeBlocks> free_;
    std::mutex mutex_;
    std::vector<bool> there_;
};

/// What is to fail, of one file or of several together.
class Faults {
public:
    enum class Operation : std::uint8_t {
        read,
        write,
        space,  ///< allocate, resize and write_zeroes
        flush,
    };

    struct Fault {
        Operation operation = Operation::write;
        std::uint64_t after = 0;  ///< so many of that kind succeed first
        std::uint64_t times = 1;  ///< how many fail then
        Errc code = Errc::io;
        unsigned percent_done = 0;  ///< of a write, before it fails
    };

    /// From now on.
    void arm(const Fault& fault) {
        const std::lock_guard lock(mutex_);
        fault_ = fault;
        counts_ = {};
        hits_ = 0;
    }

    void disarm() {
        const std::lock_guard lock(mutex_);
        fault_.reset();
    }

    /// No file grows beyond so many bytes; nothing lifts the limit.
    void set_room(std::optional<std::uint64_t> bytes) {
        const std::lock_guard lock(mutex_);
        room_ = bytes;
    }

    /// Since the last arm(): how many operations there were, and how many of them failed.
    [[nodiscard]] std::uint64_t count(Operation operation) const {
        const std::lock_guard lock(mutex_);
        return counts_[static_cast<std::size_t>(operation)];
    }
    [[nodiscard]] std::uint64_t hits() const {
        const std::lock_guard lock(mutex_);
        return hits_;
    }

    /// The fault that this operation meets.
    std::optional<Fault> next(Operation operation, std::uint64_t end = 0) {
        const std::lock_guard lock(mutex_);
        const auto n = counts_[static_cast<std::size_t>(operation)]++;
        if (fault_ && fault_->operation == operation && n >= fault_->after && n - fault_->after < fault_->times) {
            ++hits_;
            return fault_;
        }
        if (room_ && end > *room_) {
            ++hits_;
            return Fault{operation, 0, 1, Errc::no_space, 0};
        }
        return std::nullopt;
    }

private:
    mutable std::mutex mutex_;
    std::optional<Fault> fault_;
    std::optional<std::uint64_t> room_;
    std::array<std::uint64_t, 4> counts_ = {};
    std::uint64_t hits_ = 0;
};

class FaultyStorage final : public PassThrough {
    using Operation = Faults::Operation;

public:
    FaultyStorage(std::shared_ptr<Storage> inner, std::shared_ptr<Faults> faults)
        : PassThrough(std::move(inner)), faults_(std::move(faults)) {}

    Result<std::size_t> read(HostOffset at, std::span<std::byte> to) const override {
        if (const auto fault = faults_->next(Operation::read)) return failed(*fault);
        return inner().read(at, to);
    }

    Result<void> write(HostOffset at, std::span<const std::byte> from) override {
        if (const auto fault = faults_->next(Operation::write, at.value + from.size())) {
            // Disks write whole sectors or nothing of them.
            const auto end = at.value + from.size() * fault->percent_done / 100;
            const auto whole_end = fault->percent_done == 100 ? end : std::max(at.value, end / 512 * 512);
            const auto done = from.first(whole_end - at.value);
            if (auto partly = inner().write(at, done); !partly) return partly;
            return failed(*fault);
        }
        return inner().write(at, from);
    }

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        if (const auto fault = faults_->next(Operation::space)) return failed(*fault);
        return inner().write_zeroes(at, length);
    }

    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        if (const auto fault = faults_->next(Operation::space, at.value + length)) return failed(*fault);
        return inner().allocate(at, length);
    }

    Result<void> resize(std::uint64_t size) override {
        if (const auto fault = faults_->next(Operation::space, size)) return failed(*fault);
        return inner().resize(size);
    }

    Result<void> flush() override {
        if (const auto fault = faults_->next(Operation::flush)) return failed(*fault);
        return inner().flush();
    }

private:
    [[nodiscard]] std::unexpected<Error> failed(const Faults::Fault& fault) const {
        return std::unexpected(Error{fault.code, name(), "failed by the test"});
    }

    std::shared_ptr<Faults> faults_;
};

}  // namespace qcow::test
