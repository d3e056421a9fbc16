#pragma once
// Random work on a disk, held against a plain array of bytes.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/bytes.h"
#include "support/disks.h"
#include "support/random.h"

namespace qcow::test {

/// What the image under a script can do, and how it is opened anew.
struct ScriptSubject {
    std::function<std::shared_ptr<Image>()> open;
    bool can_compress = false;
    bool discards_read_as_zeros = true;  // else whole blocks may also stay as they are
    bool may_refuse_resize = false;
    bool has_snapshots = false;
    bool has_bitmaps = false;
    /// Commits the closed image to the layer below.
    std::function<void()> commit = {};
};

/// Every step checks what it can. What is wrong is an exception that tells the steps up to then.
class Script {
public:
    static constexpr std::uint64_t largest = std::uint64_t{8} << 20;

    Script(ScriptSubject subject, Bytes contents, Random random)
        : subject_(std::move(subject)), expected_(std::move(contents)), random_(std::move(random)) {}

    /// Ends with a close. What the disk must then hold: contents().
    void run(unsigned steps) try {
        image_ = subject_.open();
        verify_all();
        for (unsigned i = 0; i < steps; ++i) step();
        verify_all();
        close();
    } catch (const std::exception& e) {
        const auto shown = steps_.size() > 25 ? steps_.size() - 25 : 0;
        throw std::runtime_error(fmt::format("{}\nafter: ...\n{}", e.what(),
                                             fmt::join(steps_.begin() + static_cast<long>(shown), steps_.end(), "\n")));
    }

    [[nodiscard]] const Bytes& contents() const { return expected_; }

private:
    struct Range {
        std::uint64_t at = 0;
        std::uint64_t length = 0;
    };

    struct Snapshot {
        std::string id;
        Bytes contents;
    };

    struct Bitmap {
        std::string name;
        bool enabled = true;
        std::vector<Range> changed;  // while it was enabled
    };

    void step();

    /// From single bytes to many blocks, on their borders and off them.
    Range range();

    void note(std::string step) { steps_.push_back(std::move(step)); }

    static void demand(bool condition, const std::string& otherwise);

    Bytes data(std::uint64_t length);

    void expect(Range where, const Bytes& bytes);

    /// For the enabled bitmaps.
    void mark(Range where);

    void write();

    void write_compressed();

    void zero();

    /// Bytes outside of whole blocks stay. Whole ones become zeros; where the format cannot say so they may stay, too.
    void discard();

    Bytes read_bytes(Range where);

    void verify(std::uint64_t begin, std::uint64_t end);

    void verify_all();

    void read();

    void flush();

    /// The extents cover the disk, and only those of data hold anything.
    void walk();

    /// What must not work, and changes nothing.
    void refuse();

    void resize();

    void cut_bitmaps();

    void change_snapshots();

    void verify_snapshot(const Snapshot& snapshot);

    void change_bitmaps();

    /// What has changed is dirty.
    void verify_bitmap(const Bitmap& bitmap);

    void commit();

    void close();

    void reopen();

    ScriptSubject subject_;
    Bytes expected_;
    Random random_;
    std::shared_ptr<Image> image_;
    std::vector<Snapshot> snapshots_;
    std::vector<Bitmap> bitmaps_;
    std::vector<std::string> steps_;
};

}  // namespace qcow::test
