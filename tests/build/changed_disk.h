#pragma once
// A raw disk whose file system a test changes in place.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "base/try.h"
#include "engine/crash_states.h"
#include "qcow/disk.h"
#include "qcow/filesystem.h"
#include "qcow/storage.h"
#include "support/effort.h"
#include "support/random.h"
#include "support/recording.h"
#include "support/result.h"
#include "support/subprocess.h"
#include "support/temporary_directory.h"

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

/// Replaces /value by 12,000 bytes of "n", and removes a file of /dir. Returns a new directory in /dir.
inline Inode replace_and_remove(FileSystem& files, const std::string& removed, const std::string& made) {
    const auto root = files.root();
    const auto directory = must(find_path(files, "/dir"));
    put(files, root, ".qcow-put-0", std::string(12'000, 'n'));
    must(files.replace(root, ".qcow-put-0", "value"));
    must(files.remove(directory, removed));
    return must(files.create(directory, made, node(FileType::directory)));
}

/// A file system in a file, which a test makes and changes.
class ChangedDiskTest : public testing::Test {
protected:
    static constexpr const char* disk_name = "disk.raw";

    std::string shell(const std::string& script) const {
        return must_run({"bash", "-euc", script}, directory_.path()).out;
    }

    /// The file that `script` makes, in memory.
    [[nodiscard]] Files made_by(const std::string& script) const {
        shell(script);
        return {{disk_name, load(directory_.file(disk_name), disk_name)}};
    }

    /// Saves some of the states that a power loss within `change` may leave, one after the other, and calls `judge` for
    /// each. `moments`: about so many of them; `unit`: sectors that arrive together.
    void lose_power(const Files& before, const std::string& name, unsigned moments, unsigned unit,
                    const std::function<void(Disk&)>& change, const std::function<void(const Files&)>& judge) const {
        StorageLog log;
        const auto files = copy_of(before);
        StorageDisk disk(std::make_shared<RecordingStorage>(files.at(disk_name), disk_name, log));
        change(disk);
        CrashStates states(log, before);
        auto random = Random::named(name);
        const auto step = std::max<std::size_t>(log.events().size() / (moments * effort()), 1);
        for (std::size_t moment = 1; moment <= log.events().size(); moment += random.between(1, 2 * step)) {
            states.advance(moment);
            const auto seed = random.below(1U << 30);
            const bool all = random.chance(25);
            SCOPED_TRACE(fmt::format("{}: power loss before event {} of {}, seed {}, all {}", name, moment,
                                     log.events().size(), seed, all));
            const auto crashed = states.build([&](std::size_t event, std::uint64_t sector) {
                return all || Random(seed ^ event << 32 ^ sector / unit).chance(50);
            });
            save(crashed, directory_.path());
            judge(crashed);
            if (HasFatalFailure()) return;
        }
    }

    TemporaryDirectory directory_;
};

}  // namespace qcow::test
