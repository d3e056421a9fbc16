#include "build/ext_plan.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <vector>

#include "filesystem/readers.h"
#include "qcow/text.h"

namespace qcow {
namespace {

constexpr std::uint64_t bytes_per_inode = 16 * KiB;
constexpr std::uint64_t least_with_journal = 2048;  // blocks

struct ExtFeature {
    std::string_view name;
    std::uint32_t ext2_super_block::* word;
    std::uint32_t bit;
};
constexpr auto ext_features = std::to_array<ExtFeature>({
    {"dir_index", &ext2_super_block::s_feature_compat, EXT2_FEATURE_COMPAT_DIR_INDEX},
    {"has_journal", &ext2_super_block::s_feature_compat, EXT3_FEATURE_COMPAT_HAS_JOURNAL},
    {"resize_inode", &ext2_super_block::s_feature_compat, EXT2_FEATURE_COMPAT_RESIZE_INODE},
    {"sparse_super2", &ext2_super_block::s_feature_compat, EXT4_FEATURE_COMPAT_SPARSE_SUPER2},
    {"64bit", &ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_64BIT},
    {"extents", &ext2_super_block::s_feature_incompat, EXT3_FEATURE_INCOMPAT_EXTENTS},
    {"flex_bg", &ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_FLEX_BG},
    {"metadata_csum_seed", &ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_CSUM_SEED},
    {"dir_nlink", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_DIR_NLINK},
    {"extra_isize", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE},
    {"huge_file", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_HUGE_FILE},
    {"large_file", &ext2_super_block::s_feature_ro_compat, EXT2_FEATURE_RO_COMPAT_LARGE_FILE},
    {"metadata_csum", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_METADATA_CSUM},
    {"sparse_super", &ext2_super_block::s_feature_ro_compat, EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER},
    {"uninit_bg", &ext2_super_block::s_feature_ro_compat, EXT4_FEATURE_RO_COMPAT_GDT_CSUM},
});

Result<std::uint64_t> number_option(const Volume& volume, const std::string& name, const std::string& text,
                                    std::uint64_t least, std::uint64_t most) {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size() || value < least || value > most) {
        return volume.refuse("options." + name,
                             fmt::format("option {} wants a whole number from {} to {}", name, least, most));
    }
    return value;
}

void set_default_features(ExtPlan& plan, FilesystemSpec::Type type) {
    auto& super = plan.super;
    super.s_feature_compat =
        EXT2_FEATURE_COMPAT_EXT_ATTR | EXT2_FEATURE_COMPAT_RESIZE_INODE | EXT2_FEATURE_COMPAT_DIR_INDEX;
    super.s_feature_incompat = EXT2_FEATURE_INCOMPAT_FILETYPE;
    super.s_feature_ro_compat = EXT2_FEATURE_RO_COMPAT_SPARSE_SUPER | EXT2_FEATURE_RO_COMPAT_LARGE_FILE;
    if (type == FilesystemSpec::Type::ext2) return;
    super.s_feature_compat |= EXT3_FEATURE_COMPAT_HAS_JOURNAL;
    if (type == FilesystemSpec::Type::ext3) return;
    super.s_feature_incompat |=
        EXT3_FEATURE_INCOMPAT_EXTENTS | EXT4_FEATURE_INCOMPAT_64BIT | EXT4_FEATURE_INCOMPAT_FLEX_BG;
    super.s_feature_ro_compat |= EXT4_FEATURE_RO_COMPAT_HUGE_FILE | EXT4_FEATURE_RO_COMPAT_DIR_NLINK |
                                 EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE | EXT4_FEATURE_RO_COMPAT_METADATA_CSUM;
}

/// Attributes in the inode, behind its fields, take this many bytes; others need a block.
bool fits_in_inode(const ExtPlan& plan, const TreeInode::Rare& rare) {
    std::uint64_t bytes = 8;
    for (const auto& [name, value] : rare.xattrs)
        bytes += 16 + divide_up(name.size(), 4) * 4 + divide_up(value.size(), 4) * 4;
    return plan.inode_size >= 160 + bytes;
}

class Counter {
public:
    Counter(const Volume& volume, const ExtPlan& plan) : volume_(volume), plan_(plan) {}

    Result<ExtNeeds> count() {
        needs_.inodes = EXT2_GOOD_OLD_FIRST_INO;
        TRY_VOID(count_name(volume_.tree.root()));
        needs_.blocks += 1;  // the resize inode's
        return needs_;
    }

private:
    /// Counts what one more name leads to.
    Result<void> count_name(TreeInode& inode) {
        ++needs_.files;
        if (inode.links++ == 0) TRY_VOID(count(inode));
        if (!inode.is_directory()) return {};
        for (const auto& [name, child] : inode.children->entries()) {
            if (auto counted = count_name(*child); !counted)
                return failed_file(std::move(counted).error(), name.text());
        }
        auto blocks = blocks_of_directory(*inode.children, plan_.shape());
        if (&inode == &volume_.tree.root()) blocks += divide_up(lost_found_bytes, plan_.block_size);
        add_blocks({{{.start = 0, .length = blocks}}});
        return {};
    }

    Result<void> count(const TreeInode& inode) {
        ++needs_.inodes;
        if (inode.rare) {
            if (!inode.rare->xattrs.empty() && !fits_in_inode(plan_, *inode.rare)) needs_.blocks += 1;
            if (inode.rare->major > most_major || inode.rare->minor > most_minor) {
                return refuse_file(fmt::format("ext cannot hold a device with the numbers {} and {}", inode.rare->major,
                                               inode.rare->minor));
            }
            if (S_ISLNK(inode.mode) && inode.rare->target.size() >= 60) needs_.blocks += 1;
            if (S_ISLNK(inode.mode) && inode.rare->target.size() >= plan_.block_size)
                return refuse_file("the target of the symbolic link is longer than a block");
        }
        if (S_ISLNK(inode.mode) && (!inode.rare || inode.rare->target.empty()))
            return refuse_file("the symbolic link has no target");
        if (!S_ISREG(inode.mode)) return {};
        if (inode.size / plan_.block_size >= largest_file_blocks(plan_.extents(), plan_.block_size))
            return refuse_file("the file is larger than this file system can hold");
        add_blocks(block_runs(inode, plan_.block_size));
        return {};
    }

    /// What the blocks take, and what leads to them.
    void add_blocks(std::span<const DataRun> runs) {
        for (const auto& run : runs) needs_.blocks += run.length;
        needs_.blocks +=
            plan_.extents() ? extent_blocks_at_most(runs, plan_.block_size) : indirect_blocks(runs, plan_.block_size);
    }

    const Volume& volume_;
    const ExtPlan& plan_;
    ExtNeeds needs_;
};

void forget_links(TreeInode& inode) {
    inode.links = 0;
    inode.number = 0;
    if (!inode.is_directory()) return;
    for (const auto& entry : inode.children->entries()) forget_links(*entry.inode);
}

std::uint64_t inodes_for(const ExtPlan& plan, const ExtNeeds& needs, std::uint64_t blocks) {
    if (plan.inodes) return *plan.inodes;
    constexpr std::uint64_t most = 0xfffffff0;
    return std::max(needs.inodes + needs.inodes / 16 + 16, std::min(blocks * plan.block_size / bytes_per_inode, most));
}

}  // namespace

std::unexpected<Error> refuse_file(std::string what) { return fail(Errc::invalid_argument, "", std::move(what)); }
std::unexpected<Error> failed_file(Error error, std::string_view name) {
    if (error.code == Errc::invalid_argument) error.place = fmt::format("/{}{}", printable(name), error.place);
    return std::unexpected(std::move(error));
}

std::unexpected<Error> failed_tree(const Volume& volume, Error error) {
    if (error.code == Errc::invalid_argument) error = std::move(error).in(volume.at("source"));
    return std::unexpected(std::move(error));
}

Result<ExtPlan> plan_of_ext(const Volume& volume) {
    ExtPlan plan;
    const auto& spec = volume.spec;
    plan.block_size = spec.block_size.value_or(4096);
    if (plan.block_size != 1024 && plan.block_size != 2048 && plan.block_size != 4096)
        return volume.refuse("block_size", "ext wants a block_size of 1024, 2048 or 4096");
    if (spec.label.size() > EXT2_LABEL_LEN)
        return volume.refuse("label", "the label is longer than the 16 bytes that ext has");
    set_default_features(plan, spec.type);
    std::vector<std::string> known = {"journal_blocks", "inodes", "inode_size", "reserved_percent"};
    for (const auto& feature : ext_features) known.emplace_back(feature.name);
    for (const auto& option : spec.options) {
        const auto& name = option.first;
        const auto& text = option.second;
        const auto number = [&](std::uint64_t least, std::uint64_t most) {
            return number_option(volume, name, text, least, most);
        };
        const auto feature = std::ranges::find(ext_features, std::string_view(name), &ExtFeature::name);
        if (feature != ext_features.end()) {
            if (text != "on" && text != "off") {
                return volume.refuse("options." + name,
                                     fmt::format("option {} is \"{}\", and must be on or off", name, printable(text)));
            }
            (plan.super.*feature->word &= ~feature->bit) |= text == "on" ? feature->bit : 0;
        } else if (name == "journal_blocks") {
            plan.journal_blocks = TRY(number(1024, 10240000));
        } else if (name == "inodes") {
            plan.inodes = TRY(number(16, 0xfffffff0));
        } else if (name == "inode_size") {
            const auto size = TRY(number(least_inode_size, plan.block_size));
            if (!std::has_single_bit(size))
                return volume.refuse("options." + name, "option inode_size wants a power of two");
            plan.inode_size = static_cast<std::uint32_t>(size);
        } else if (name == "reserved_percent") {
            plan.reserved_percent = static_cast<unsigned>(TRY(number(0, 50)));
        } else {
            return volume.refuse("options." + name,
                                 fmt::format("ext has no option \"{}\"{}", printable(name), did_you_mean(name, known)));
        }
    }
    // Without these, nothing can grow later or hold attributes; e2fsck refuses some combinations.
    if (plan.inode_size == least_inode_size) plan.super.s_feature_ro_compat &= ~EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE;
    return plan;
}

std::uint64_t journal_blocks_of_ext(const ExtPlan& plan, std::uint64_t blocks) {
    if (!plan.journal()) return 0;
    if (plan.journal_blocks) return *plan.journal_blocks;
    const int usual = ext2fs_default_journal_size(blocks);
    return usual < 0 ? 0 : static_cast<std::uint64_t>(usual);
}

Result<ExtNeeds> needs_of_ext(const Volume& volume, const ExtPlan& plan) {
    auto& root = volume.tree.root();
    auto& place = volume.tree.place_in(root, lost_found).inode;
    if (place == nullptr) {
        place = &volume.tree.new_inode(S_IFDIR | 0700);
        place->mtime = volume.time;
    }
    if (!place->is_directory()) return volume.refuse("source", "/lost+found is no directory, as ext requires");
    forget_links(root);
    auto needs = Counter(volume, plan).count();
    return needs ? needs : failed_tree(volume, std::move(needs).error());
}

Result<ext2_filsys> begin_ext(ExtIo& io, const Volume& volume, const ExtPlan& plan, const ExtNeeds& needs,
                              std::uint64_t blocks) {
    constexpr std::uint64_t most_blocks = 0xffffffff;
    if (blocks > most_blocks) {
        return volume.refuse(
            "size", fmt::format("ext is made with at most 2^32 - 1 blocks, of {} bytes here", plan.block_size));
    }
    auto super = plan.super;
    super.s_rev_level = EXT2_DYNAMIC_REV;
    super.s_log_block_size = static_cast<std::uint32_t>(std::countr_zero(plan.block_size / 1024));
    super.s_log_cluster_size = super.s_log_block_size;
    super.s_inode_size = static_cast<std::uint16_t>(plan.inode_size);
    ext2fs_blocks_count_set(&super, blocks);
    const auto inodes = inodes_for(plan, needs, blocks);
    if (inodes > 0xffffffff || inodes < needs.inodes) {
        return volume.refuse("options.inodes",
                             fmt::format("the tree has {} files, and there are {} inodes", needs.inodes, inodes));
    }
    super.s_inodes_count = static_cast<std::uint32_t>(inodes);
    ext2fs_r_blocks_count_set(&super, blocks / 100 * plan.reserved_percent);
    if (plan.has(&ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_64BIT))
        super.s_desc_size = EXT2_MIN_DESC_SIZE_64BIT;
    if (plan.has(&ext2_super_block::s_feature_incompat, EXT4_FEATURE_INCOMPAT_FLEX_BG)) super.s_log_groups_per_flex = 4;
    if (journal_blocks_of_ext(plan, blocks) == 0) super.s_feature_compat &= ~EXT3_FEATURE_COMPAT_HAS_JOURNAL;
    super.s_errors = EXT2_ERRORS_DEFAULT;
    auto begun = io.initialize(EXT2_FLAG_EXCLUSIVE, super);
    if (!begun && (begun.error().code == Errc::no_space || begun.error().code == Errc::corrupt)) {
        return fail(Errc::no_space, volume.at("size"),
                    fmt::format("No space: {} bytes have no room for the tables of ext with {} inodes",
                                blocks * plan.block_size, inodes));
    }
    return begun;
}

std::uint64_t room_of_ext(ext2_filsys fs, const ExtPlan& plan) {
    std::uint64_t free = ext2fs_free_blocks_count(fs->super);
    // With flexible groups, libext2fs takes the tables off when it places them.
    if (ext2fs_has_feature_flex_bg(fs->super))
        free -= std::min<std::uint64_t>(free, std::uint64_t{fs->group_desc_count} * (fs->inode_blocks_per_group + 2));
    const auto journal = journal_blocks_of_ext(plan, ext2fs_blocks_count(fs->super));
    const auto journal_tables = journal == 0 || plan.extents() ? 0 : 8 + journal / 64;
    return free - std::min<std::uint64_t>(free, journal + journal_tables);
}

Result<std::uint64_t> fitted_ext(const Volume& volume) {
    const auto plan = TRY(plan_of_ext(volume));
    const auto needs = TRY(needs_of_ext(volume, plan));
    const auto used = needs.blocks + needs.blocks * volume.spec.free_percent / 100;
    const auto wanted = used + divide_up(volume.spec.free_bytes, plan.block_size);
    auto blocks = std::max<std::uint64_t>(wanted + wanted / 50, 64 * KiB / plan.block_size);
    if (plan.journal()) blocks += plan.journal_blocks.value_or(1024);
    const std::uint64_t unit = std::max<std::uint64_t>(4096 / plan.block_size, 1);
    constexpr unsigned most_tries = 100;
    for (unsigned i = 0; i < most_tries; ++i) {
        blocks = divide_up(blocks, unit) * unit;
        PlannedDisk disk(blocks * plan.block_size);
        ExtIo io(disk);
        auto begun = begin_ext(io, volume, plan, needs, blocks);
        if (!begun && begun.error().code == Errc::invalid_argument) return std::unexpected(std::move(begun).error());
        if (!begun) {
            blocks += blocks / 8 + unit;  // there are more inodes than so many blocks can have
            continue;
        }
        const ExtHandle fs(*begun);
        // libext2fs leaves out a last group that is too small for its own tables.
        const auto there = ext2fs_blocks_count(fs->super);
        const auto free = room_of_ext(fs.get(), plan);
        const bool journal_fits = !plan.journal() || journal_blocks_of_ext(plan, there) != 0;
        if (free >= wanted && journal_fits) return there * plan.block_size;
        if (!journal_fits) blocks = std::max(blocks, least_with_journal - unit);
        blocks += std::max(wanted - std::min(free, wanted), unit);
    }
    return volume.refuse("size", "no size was found that fits the tree; give a size");
}

Result<TimeRange> times_of_ext(const Volume& volume) {
    const auto plan = TRY(plan_of_ext(volume));
    return TimeRange{-0x80000000LL, plan.inode_size == least_inode_size ? 0x7fffffffLL : 0x37fffffffLL};
}

}  // namespace qcow
