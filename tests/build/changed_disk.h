#pragma once
// A raw disk whose file system a test changes in place.

#include <gtest/gtest.h>

#include "base/try.h"
#include "qcow/disk.h"
#include "qcow/filesystem.h"
#include "qcow/storage.h"
#include "support/result.h"

namespace qcow::test {

/// The raw disk that a storage holds.
class StorageDisk final : public Disk {
public:
    explicit StorageDisk(std::shared_ptr<Storage> storage) : storage_(std::move(storage)) {}
    [[nodiscard]] std::uint64_t size() const override { return must(storage_->size()); }
    [[nodiscard]] std::uint64_t block_size() const override { return 512; }

protected:
    Result<void> do_read(GuestOffset at, Buffers to) override {
        TRY(storage_->read({at.value}, to));
        return {};
    }
    Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
        return Extent{.start = at, .length = limit, .kind = Extent::Kind::data};
    }
    [[nodiscard]] Result<void> verify_writable() const override { return {}; }
    Result<void> do_write(GuestOffset at, ConstBuffers from) override { return storage_->write({at.value}, from); }
    Result<void> do_write_zeroes(GuestOffset at, std::uint64_t length, Zeroes) override {
        return storage_->write_zeroes({at.value}, length);
    }
    Result<void> do_flush() override { return storage_->flush(); }

private:
    std::shared_ptr<Storage> storage_;
};

inline std::string contents(FileSystem& files, const std::string& path) {
    const auto inode = find_path(files, path);
    if (!inode) return {};
    std::string text(100'000, '\0');
    const auto done = files.read(*inode, 0, std::as_writable_bytes(std::span(text)));
    text.resize(done ? *done : 0);
    return text;
}

inline NewNode node(FileType type) {
    NewNode made;
    made.info.type = type;
    made.info.modified = Timestamp{1'700'000'000, 0};
    return made;
}

inline Inode put(FileSystem& files, Inode directory, const std::string& name, const std::string& text) {
    const auto inode = must(files.create(directory, name, node(FileType::regular)));
    must(files.write(inode, 0, std::as_bytes(std::span(text))));
    return inode;
}

}  // namespace qcow::test
