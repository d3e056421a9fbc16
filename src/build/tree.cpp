#include "build/tree.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ranges>

#include "base/within_memory.h"
#include "build/file_content.h"
#include "qcow/text.h"

namespace qcow {
namespace {

std::unexpected<Error> refuse(std::string_view path, std::string what) {
    return fail(Errc::invalid_argument, printable(path), std::move(what));
}

constexpr std::string_view whiteout = ".wh.";
constexpr std::string_view opaque = ".wh..wh..opq";

bool is_whiteout(const TreeInode& inode) {
    return S_ISCHR(inode.mode) && (!inode.rare || (inode.rare->major == 0 && inode.rare->minor == 0));
}

/// Takes the attributes of overlayfs from a file, and returns whether it hides what is below it.
Result<bool> take_overlay_attributes(TreeInode& inode, const std::string& name) {
    if (!inode.rare) return false;
    bool hides = false;
    std::string unsupported;
    std::erase_if(inode.rare->xattrs, [&](const auto& xattr) {
        std::string_view key = xattr.first;
        for (const std::string_view prefix : {"trusted.overlay.", "user.overlay."}) {
            if (!key.starts_with(prefix)) continue;
            key.remove_prefix(prefix.size());
            if (key == "opaque" && xattr.second == "y") hides = true;
            if (key == "redirect" || key == "metacopy") unsupported = key;
            return true;
        }
        return false;
    });
    if (!unsupported.empty()) {
        return fail(
            Errc::unsupported, printable(name),
            fmt::format("overlayfs left its contents in a lower layer ({}); copy the merged tree", unsupported));
    }
    return hides;
}

/// Where a symbolic link in a tree leads to, within the tree: the parts of a path. None: to no directory of the tree.
std::optional<std::vector<std::string>> directory_behind(TreeInode& root, std::vector<std::string> path) {
    constexpr unsigned most_links = 40;
    std::vector<std::string> left(path.rbegin(), path.rend());
    std::vector<std::string> done;
    std::vector<TreeInode*> nodes = {&root};
    for (unsigned links = 0; !left.empty();) {
        const auto name = std::move(left.back());
        left.pop_back();
        if (name.empty() || name == ".") continue;
        if (name == "..") {
            if (!done.empty()) done.pop_back();
            if (nodes.size() > 1) nodes.pop_back();
            continue;
        }
        if (!nodes.back()->is_directory()) return {};
        auto* child = nodes.back()->children->find(name);
        if (child == nullptr) return {};
        if (!S_ISLNK(child->mode)) {
            done.push_back(name);
            nodes.push_back(child);
            continue;
        }
        const std::string_view target = child->rare ? std::string_view(child->rare->target) : std::string_view();
        if (++links > most_links || target.empty() || target.size() > longest_path) return {};
        if (target.starts_with('/')) {
            done.clear();
            nodes.resize(1);
        }
        std::vector<std::string> parts;
        for (const auto part : std::views::split(target, '/')) parts.emplace_back(std::string_view(part));
        left.insert(left.end(), parts.rbegin(), parts.rend());
    }
    return nodes.back()->is_directory() ? std::optional(std::move(done)) : std::nullopt;
}

/// Exchanges two directories, but not what is in them.
void exchange_attributes(TreeInode*& a, TreeInode*& b) {
    std::swap(a, b);
    std::swap(a->children, b->children);
}

/// Puts a layer over a tree.
class Layering {
public:
    explicit Layering(Tree& lower) : lower_(lower) {}

    Result<void> run(TreeInode& upper) {
        TRY_VOID(put_over(lower_.root(), upper, {}));
        // What lies behind links comes last: it may lie in a directory that the layer changes.
        while (!behind_links_.empty()) {
            const auto [path, directory] = std::move(behind_links_.back());
            behind_links_.pop_back();
            const auto whole = fmt::format("{}", fmt::join(path, "/"));
            auto* there = lower_.find(whole);
            if (there == nullptr || !there->is_directory())
                return refuse(whole, "the layer removes it, and puts files into it by a link");
            TRY_VOID(put_over(*there, *directory, path));
        }
        return {};
    }

private:
    /// `path` is the one of both.
    Result<void> put_over(TreeInode& lower, TreeInode& upper, const std::vector<std::string>& path) {
        if (upper.children->find(opaque) != nullptr) lower.children->clear();
        for (const auto& entry : upper.children->entries()) {
            const auto name = entry.name.text();
            if (name == opaque) continue;
            if (name.starts_with(whiteout)) {
                lower.children->erase(name.substr(whiteout.size()));
            } else if (is_whiteout(*entry.inode)) {
                lower.children->erase(name);
            }
        }
        for (auto& entry : upper.children->entries()) {
            const auto name = entry.name.text();
            if (name.starts_with(whiteout) || is_whiteout(*entry.inode)) continue;
            const bool hides = TRY(take_overlay_attributes(*entry.inode, std::string(name)));
            auto& there = lower_.place_in(lower, name).inode;
            if (!entry.inode->is_directory()) {
                there = entry.inode;
                continue;
            }
            auto below = path;
            below.emplace_back(name);
            const bool implied = entry.inode->children->implied;
            if (implied && there != nullptr && S_ISLNK(there->mode)) {
                if (auto behind = directory_behind(lower_.root(), below)) {
                    behind_links_.emplace_back(*std::move(behind), entry.inode);
                    continue;
                }
            }
            if (hides || there == nullptr || !there->is_directory()) there = &lower_.new_inode(S_IFDIR | 0755);
            if (!implied) {
                exchange_attributes(there, entry.inode);
                there->children->implied = false;
            }
            TRY_VOID(put_over(*there, *entry.inode, below));
        }
        return {};
    }

    Tree& lower_;
    std::vector<std::pair<std::vector<std::string>, TreeInode*>> behind_links_;
};

Result<void> set_attributes(TreeInode& inode, const FileSpec& file) {
    if (file.mode) inode.mode = (inode.mode & S_IFMT) | *file.mode;
    if (file.uid) inode.uid = *file.uid;
    if (file.gid) inode.gid = *file.gid;
    if (file.mtime) {
        inode.mtime = *file.mtime;
        inode.nanoseconds = 0;
    }
    return {};
}

/// Bytes that the specification holds.
class TextContent final : public Contents {
public:
    explicit TextContent(std::string text) : text_(std::move(text)) {}
    Result<void> read(std::uint64_t at, std::span<std::byte> to) const override {
        std::memcpy(to.data(), text_.data() + at, to.size());
        return {};
    }

private:
    std::string text_;
};

}  // namespace

Result<void> apply_file(Tree& tree, const FileSpec& file) {
    using enum FileSpec::Kind;
    if (TRY(parts_of_path(file.path)).empty()) {
        if (file.kind != change && file.kind != directory) return refuse(file.path, "is the root directory");
        return set_attributes(tree.root(), file);
    }
    if (file.kind == remove) {
        if (tree.remove(file.path)) return {};
        return refuse(file.path, "is to be removed, and no source has it");
    }
    if (file.kind == change) {
        auto* inode = tree.find(file.path);
        if (inode == nullptr)
            return refuse(file.path, "no source has it; a new file needs a type, a content, a source or a target");
        return set_attributes(*inode, file);
    }
    auto& inode = *TRY(tree.place(file.path));
    if (file.kind == directory) {
        if (inode == nullptr || !inode->is_directory()) inode = &tree.new_inode(S_IFDIR | 0755);
        return set_attributes(*inode, file);
    }
    if (file.kind == hardlink) {
        auto* target = tree.find(file.target);
        if (target == nullptr || target->is_directory())
            return refuse(file.path, fmt::format("{} is no file that a hard link can lead to", printable(file.target)));
        inode = target;
        return set_attributes(*inode, file);
    }
    const auto make = [&](mode_t mode) { inode = &tree.new_inode(mode); };
    switch (file.kind) {
        case symlink:
            make(S_IFLNK | 0777);
            inode->make_rare().target = file.target;
            break;
        case character_device: make(S_IFCHR | 0644); break;
        case block_device: make(S_IFBLK | 0644); break;
        case fifo: make(S_IFIFO | 0644); break;
        case socket: make(S_IFSOCK | 0644); break;
        default: make(S_IFREG | 0644); break;
    }
    if (file.kind == character_device || file.kind == block_device) {
        inode->make_rare().major = file.major;
        inode->make_rare().minor = file.minor;
    }
    if (!file.source.empty()) {
        const auto mode = inode->mode;
        TRY_VOID(fill_from_file(tree, *inode, file.source));
        inode->mode = mode;
    } else if (!file.content.empty()) {
        inode->size = file.content.size();
        inode->content = tree.keep(std::make_shared<TextContent>(file.content));
    }
    return set_attributes(*inode, file);
}

Result<std::vector<std::string_view>> parts_of_path(std::string_view path) {
    std::vector<std::string_view> parts;
    if (path.size() > longest_path) return refuse(path.substr(0, 64), "the path is longer than 4095 bytes");
    const auto whole = path;
    while (!path.empty()) {
        const auto length = std::min(path.find('/'), path.size());
        const auto part = path.substr(0, length);
        path.remove_prefix(std::min(length + 1, path.size()));
        if (part.empty() || part == ".") continue;
        if (part == "..")
            return fail(Errc::refused_by_policy, printable(whole), "a path with \"..\" may lead out of the tree");
        if (part.size() > longest_name) return refuse(whole, "a name in it is longer than 255 bytes");
        parts.push_back(part);
    }
    if (parts.size() > deepest_directory) return refuse(whole.substr(0, 64), "it lies deeper than 1000 directories");
    return parts;
}

// ---- Names ----

TreeName TreeNames::keep(std::string_view name) {
    if (block_bytes - used_ <= name.size()) {
        blocks_.push_back(std::make_unique_for_overwrite<char[]>(block_bytes));
        used_ = 0;
    }
    auto* at = blocks_.back().get() + used_;
    *at = static_cast<char>(name.size());
    std::ranges::copy(name, at + 1);
    used_ += name.size() + 1;
    return TreeName(at);
}

namespace {

std::string_view text_of(const TreeEntry& entry) { return entry.name.text(); }

}  // namespace

std::size_t Children::size() const {
    std::size_t all = 0;
    for (const auto& piece : pieces_) all += piece.size();
    return all;
}

std::size_t Children::piece_of(std::string_view name) const {
    const auto behind =
        std::ranges::upper_bound(pieces_, name, {}, [](const Piece& piece) { return text_of(piece.front()); });
    return behind == pieces_.begin() ? 0 : static_cast<std::size_t>(behind - pieces_.begin()) - 1;
}

TreeInode* Children::find(std::string_view name) const {
    if (pieces_.empty()) return nullptr;
    const auto& piece = pieces_[piece_of(name)];
    const auto found = std::ranges::lower_bound(piece, name, {}, text_of);
    return found != piece.end() && text_of(*found) == name ? found->inode : nullptr;
}

TreeEntry& Children::place(std::string_view name, TreeNames& names) {
    if (pieces_.empty()) return pieces_.emplace_back().emplace_back(names.keep(name));
    const auto number = piece_of(name);
    auto& piece = pieces_[number];
    const auto found = std::ranges::lower_bound(piece, name, {}, text_of);
    if (found != piece.end() && text_of(*found) == name) return *found;
    if (piece.size() < most_in_piece) return *piece.insert(found, TreeEntry{names.keep(name)});
    // A full piece is divided, except where names come in their order.
    const auto next = pieces_.begin() + static_cast<std::ptrdiff_t>(number) + 1;
    if (found == piece.end()) return pieces_.emplace(next)->emplace_back(names.keep(name));
    const auto middle = piece.begin() + most_in_piece / 2;
    Piece second(middle, piece.end());
    piece.erase(middle, piece.end());
    pieces_.insert(next, std::move(second));
    return place(name, names);
}

bool Children::erase(std::string_view name) {
    if (pieces_.empty()) return false;
    const auto number = piece_of(name);
    auto& piece = pieces_[number];
    const auto found = std::ranges::lower_bound(piece, name, {}, text_of);
    if (found == piece.end() || text_of(*found) != name) return false;
    piece.erase(found);
    if (piece.empty()) pieces_.erase(pieces_.begin() + static_cast<std::ptrdiff_t>(number));
    return true;
}

// ---- Trees ----

namespace {

void walk_inodes(TreeInode& inode, const std::function<void(TreeInode&)>& visit) {
    visit(inode);
    if (!inode.is_directory()) return;
    for (const auto& entry : inode.children->entries()) walk_inodes(*entry.inode, visit);
}

}  // namespace

Tree::Tree() : inodes_(1), names_(1), root_(&new_inode(S_IFDIR | 0755)) { root_->children->implied = true; }

TreeInode& Tree::new_inode(mode_t mode) {
    auto& inode = inodes_.front().emplace_back();
    inode.mode = mode;
    if (S_ISDIR(mode)) inode.children = std::make_unique<Children>();
    return inode;
}

TreeInode* Tree::find(std::string_view path) {
    const auto parts = parts_of_path(path);
    if (!parts) return nullptr;
    auto* inode = root_;
    for (const auto part : *parts) {
        if (inode == nullptr || !inode->is_directory()) return nullptr;
        inode = inode->children->find(part);
    }
    return inode;
}

Result<TreeInode**> Tree::place(std::string_view path) {
    auto** place = &root_;
    for (const auto part : TRY(parts_of_path(path))) {
        if (*place == nullptr) {
            *place = &new_inode(S_IFDIR | 0755);
            (*place)->children->implied = true;
        }
        if (!(*place)->is_directory())
            return refuse(path, "the path leads through a file that is no directory; symbolic links are not followed");
        place = &place_in(**place, part).inode;
    }
    return place;
}

bool Tree::remove(std::string_view path) {
    const auto parts = parts_of_path(path);
    if (!parts || parts->empty()) return false;
    auto* directory = root_;
    for (const auto part : std::span(*parts).first(parts->size() - 1)) {
        if (!directory->is_directory()) return false;
        directory = directory->children->find(part);
        if (directory == nullptr) return false;
    }
    return directory->is_directory() && directory->children->erase(parts->back());
}

void Tree::adopt(Tree& other) {
    inodes_.splice(inodes_.end(), other.inodes_);
    names_.splice(names_.end(), other.names_);
    std::ranges::move(other.sources_, std::back_inserter(sources_));
}

void Tree::each_inode(const std::function<void(TreeInode&)>& visit) {
    walk_inodes(*root_, [](TreeInode& inode) { inode.links = 0; });
    walk_inodes(*root_, [&](TreeInode& inode) {
        if (inode.links++ == 0) visit(inode);
    });
}

void Tree::forget_files() {
    inodes_.clear();
    root_ = &inodes_.emplace_back().emplace_back();
}

Result<void> put_layer(Tree& lower, Tree upper) {
    const bool hides = TRY(take_overlay_attributes(upper.root(), "/"));
    lower.adopt(upper);
    auto*& from = *TRY(upper.place(""));
    if (!from->children->implied) exchange_attributes(*TRY(lower.place("")), from);
    if (hides) lower.root().children->clear();
    return Layering(lower).run(*from);
}

}  // namespace qcow
