#include "support/faulty.h"

namespace qcow::test {

void FreeBlocks::set(std::optional<std::uint64_t> blocks) {
    const std::lock_guard lock(mutex_);
    free_ = blocks;
}

std::uint64_t FreeBlocks::take(std::uint64_t wanted) {
    const std::lock_guard lock(mutex_);
    const auto given = free_ ? std::min(wanted, *free_) : wanted;
    if (free_) *free_ -= given;
    taken_ += given;
    if (given < wanted) ++refused_;
    return given;
}

void FreeBlocks::give(std::uint64_t blocks) {
    const std::lock_guard lock(mutex_);
    if (free_) *free_ += blocks;
}

std::uint64_t FreeBlocks::taken() const {
    const std::lock_guard lock(mutex_);
    return taken_;
}

std::uint64_t FreeBlocks::refused() const {
    const std::lock_guard lock(mutex_);
    return refused_;
}

SparseStorage::SparseStorage(std::shared_ptr<Storage> inner, std::shared_ptr<FreeBlocks> free, Zeros zeros)
    : PassThrough(std::move(inner)), free_(std::move(free)) {
    Bytes bytes(must(this->inner().size()));
    must(this->inner().read({0}, bytes));
    for (std::uint64_t at = 0; at < bytes.size(); at += block) {
        const auto contents = std::span(bytes).subspan(at, std::min<std::uint64_t>(block, bytes.size() - at));
        there_.push_back(zeros == Zeros::blocks ||
                         std::ranges::any_of(contents, [](std::byte b) { return b != std::byte{0}; }));
    }
}

Result<void> SparseStorage::write(HostOffset at, ConstBuffers from) {
    const std::lock_guard lock(mutex_);
    const auto done = take(at.value, at.value + from.size());
    if (done == at.value + from.size()) return inner().write(at, from);
    if (done > at.value) must(inner().write(at, from.first(done - at.value)));
    return full();
}

Result<void> SparseStorage::allocate(HostOffset at, std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    if (take(at.value, at.value + length) < at.value + length) return full();
    return inner().allocate(at, length);
}

Result<void> SparseStorage::write_zeroes(HostOffset at, std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    give((at.value + block - 1) / block, (at.value + length) / block);
    return inner().write_zeroes(at, length);
}

Result<void> SparseStorage::resize(std::uint64_t size) {
    const std::lock_guard lock(mutex_);
    give((size + block - 1) / block, there_.size());
    return inner().resize(size);
}

std::uint64_t SparseStorage::take(std::uint64_t begin, std::uint64_t end) {
    there_.resize(std::max<std::size_t>(there_.size(), (end + block - 1) / block));
    for (auto i = begin / block; i * block < end; ++i) {
        if (there_[i]) continue;
        if (free_->take(1) == 0) return std::max(begin, i * block);
        there_[i] = true;
    }
    return end;
}

void SparseStorage::give(std::uint64_t first, std::uint64_t end) {
    for (auto i = first; i < std::min<std::uint64_t>(end, there_.size()); ++i) {
        if (there_[i]) free_->give(1);
        there_[i] = false;
    }
}

std::unexpected<Error> SparseStorage::full() const {
    return std::unexpected(Error{Errc::no_space, name(), "no block is free in the test"});
}

void Faults::arm(const Fault& fault) {
    const std::lock_guard lock(mutex_);
    fault_ = fault;
    counts_ = {};
    hits_ = 0;
}

void Faults::disarm() {
    const std::lock_guard lock(mutex_);
    fault_.reset();
}

void Faults::set_room(std::optional<std::uint64_t> bytes) {
    const std::lock_guard lock(mutex_);
    room_ = bytes;
}

std::uint64_t Faults::count(Operation operation) const {
    const std::lock_guard lock(mutex_);
    return counts_[static_cast<std::size_t>(operation)];
}

std::uint64_t Faults::hits() const {
    const std::lock_guard lock(mutex_);
    return hits_;
}

std::optional<Faults::Fault> Faults::next(Operation operation, std::uint64_t end) {
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

Result<std::size_t> FaultyStorage::read(HostOffset at, Buffers to) const {
    if (const auto fault = faults_->next(Operation::read)) return failed(*fault);
    return inner().read(at, to);
}

Result<void> FaultyStorage::write(HostOffset at, ConstBuffers from) {
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

Result<void> FaultyStorage::write_zeroes(HostOffset at, std::uint64_t length) {
    if (const auto fault = faults_->next(Operation::space)) return failed(*fault);
    return inner().write_zeroes(at, length);
}

Result<void> FaultyStorage::allocate(HostOffset at, std::uint64_t length) {
    if (const auto fault = faults_->next(Operation::space, at.value + length)) return failed(*fault);
    return inner().allocate(at, length);
}

Result<void> FaultyStorage::resize(std::uint64_t size) {
    if (const auto fault = faults_->next(Operation::space, size)) return failed(*fault);
    return inner().resize(size);
}

Result<void> FaultyStorage::flush() {
    if (const auto fault = faults_->next(Operation::flush)) return failed(*fault);
    return inner().flush();
}

std::unexpected<Error> FaultyStorage::failed(const Faults::Fault& fault) const {
    return std::unexpected(Error{fault.code, name(), "failed by the test"});
}

}  // namespace qcow::test
