#pragma once
// A Storage in front of another one: what wrappers are made from that see or change some of what passes.

#include <memory>

#include "qcow/storage.h"

namespace qcow {

class PassThrough : public Storage {
public:
    explicit PassThrough(std::shared_ptr<Storage> inner) : inner_(std::move(inner)) {}

    [[nodiscard]] const std::string& name() const override { return inner_->name(); }
    [[nodiscard]] std::string identity() const override { return inner_->identity(); }
    [[nodiscard]] Result<std::uint64_t> size() const override { return inner_->size(); }
    [[nodiscard]] Result<std::uint64_t> allocated() const override { return inner_->allocated(); }
    Result<std::size_t> read(HostOffset at, Buffers to) const override { return inner_->read(at, to); }
    Result<void> write(HostOffset at, ConstBuffers from) override { return inner_->write(at, from); }
    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override { return inner_->write_zeroes(at, length); }
    Result<void> allocate(HostOffset at, std::uint64_t length) override { return inner_->allocate(at, length); }
    Result<void> resize(std::uint64_t size) override { return inner_->resize(size); }
    Result<void> flush() override { return inner_->flush(); }
    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override { return inner_->run(at, limit); }

protected:
    [[nodiscard]] Storage& inner() const { return *inner_; }

private:
    std::shared_ptr<Storage> inner_;
};

}  // namespace qcow
