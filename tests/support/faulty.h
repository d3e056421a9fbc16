#pragma once
// A Storage that fails when it is told to.

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>

#include "storage/pass_through.h"

namespace qcow::test {

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
