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
    void set(std::optional<std::uint64_t> blocks);

    /// How many of `wanted` there are.
    std::uint64_t take(std::uint64_t wanted);

    void give(std::uint64_t blocks);

    [[nodiscard]] std::uint64_t taken() const;
    [[nodiscard]] std::uint64_t refused() const;

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

    SparseStorage(std::shared_ptr<Storage> inner, std::shared_ptr<FreeBlocks> free, Zeros zeros);

    Result<void> write(HostOffset at, ConstBuffers from) override;

    Result<void> allocate(HostOffset at, std::uint64_t length) override;

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override;

    Result<void> resize(std::uint64_t size) override;

private:
    static constexpr std::uint64_t block = FreeBlocks::block_bytes;

    /// Returns up to where there are blocks now.
    std::uint64_t take(std::uint64_t begin, std::uint64_t end);

    void give(std::uint64_t first, std::uint64_t end);

    [[nodiscard]] std::unexpected<Error> full() const;

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
    void arm(const Fault& fault);

    void disarm();

    /// No file grows beyond so many bytes; nothing lifts the limit.
    void set_room(std::optional<std::uint64_t> bytes);

    /// Since the last arm(): how many operations there were, and how many of them failed.
    [[nodiscard]] std::uint64_t count(Operation operation) const;
    [[nodiscard]] std::uint64_t hits() const;

    /// The fault that this operation meets.
    std::optional<Fault> next(Operation operation, std::uint64_t end = 0);

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

    Result<std::size_t> read(HostOffset at, Buffers to) const override;

    Result<void> write(HostOffset at, ConstBuffers from) override;

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override;

    Result<void> allocate(HostOffset at, std::uint64_t length) override;

    Result<void> resize(std::uint64_t size) override;

    Result<void> flush() override;

private:
    [[nodiscard]] std::unexpected<Error> failed(const Faults::Fault& fault) const;

    std::shared_ptr<Faults> faults_;
};

}  // namespace qcow::test
